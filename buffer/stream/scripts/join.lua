#!lua flags=allow-oom
-- Join: a process becomes a member of the grant. It is registered in Postgres already.
--
-- KEYS  1 shard
-- ARGV  1 epoch   2 the member's field

local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (epoch or 'none')) end
redis.call('HSET', KEYS[1], ARGV[2], '1')
return 1
