#!lua
-- Fill: put a view in place that was read from Postgres under a claim.
--
-- KEYS  1 shard   2 fills   3 view
-- ARGV  1 epoch   2 conversation   3 token   4 flushed-through sequence in the snapshot   5 view
--       6 its time to live in ms
-- Reply 1, or 0 if it may be out of date: the claim has ended, or something of the conversation was settled
--       that the snapshot does not have. What the snapshot has beyond the mark, readers recognize.

local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (epoch or 'none')) end
local token, settled = string.match(redis.call('HGET', KEYS[2], ARGV[2]) or '', '^([^/]*)/%d+/(.*)$')
if token ~= ARGV[3] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
if settled ~= '' and tonumber(settled) > tonumber(ARGV[4]) then return 0 end
redis.call('SET', KEYS[3], ARGV[5], 'PX', ARGV[6])
return 1
