#!lua flags=allow-oom
-- Report: a manager says that it was without Postgres when processes had asked that many times.
--
-- KEYS  1 shard   2 managers
-- ARGV  1 epoch   2 manager   3 how many questions it knew of; 0 only makes it known
-- Reply how many questions there are now. A report that arrives late answers no question that is newer.

local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (epoch or 'none')) end
local before = redis.call('HGET', KEYS[2], ARGV[2])
if not before or tonumber(before) < tonumber(ARGV[3]) then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
return redis.call('HGET', KEYS[2], '') or '0'
