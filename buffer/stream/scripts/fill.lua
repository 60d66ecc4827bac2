#!lua
-- Fill: put a view in place that was read from Postgres under a claim.
--
-- KEYS  1 shard   2 fills   3 view
-- ARGV  1 epoch   2 conversation   3 token   4 flushed-through sequence in the snapshot   5 view, or "" to
--       give the claim back   6 its time to live in ms
-- Reply 1, or 0 if it may be out of date: the claim has ended, or something of the conversation was settled
--       that the snapshot does not have. Items that the snapshot has beyond the mark are cut off: the tail
--       still has them, and settling will bring them.

local shard = redis.call('HMGET', KEYS[1], 'epoch', 'mark')
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
local token, settled = string.match(redis.call('HGET', KEYS[2], ARGV[2]) or '', '^([^/]*)/%d+/(.*)$')
if token ~= ARGV[3] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
if settled ~= '' and tonumber(settled) > tonumber(ARGV[4]) then return 0 end
local view, sub = ARGV[5], string.sub
if view == '' then return 0 end
local mark, at, front_end = tonumber(shard[2]), #view, 8 + tonumber(sub(view, 1, 8))
while at > front_end do
  local from = at - 17 - tonumber(sub(view, at - 14, at - 7))
  local epoch, number = string.match(sub(view, from + 1, from + 40), '^%[(%d+),(%d+),')
  if epoch ~= ARGV[1] or tonumber(number) <= mark then break end
  at = from
end
redis.call('SET', KEYS[3], sub(view, 1, at), 'PX', ARGV[6])
return 1
