#!lua flags=allow-oom
-- Grant: empty a shard and open it for an epoch. Every other script refuses a caller of another epoch.
--
-- KEYS  1 stream   2 shard   3 ids   4 ids.old   5 leases   6 fills   7 managers
-- ARGV  1 epoch    2 the fence that was put up for it   3 number of members   then the members' fields, and
--       the names of the managers
-- Reply the epoch in force, or "". It counts only over that fence, which it takes down: so it counts once,
--       and one that arrives late wipes nothing. A full Redis lets it run: it frees more than it takes.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'fence')
if shard[2] ~= ARGV[2] then return shard[1] or '' end
redis.call('UNLINK', unpack(KEYS))
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'mark', '-1', 'bytes', '0', 'settled', '0',
  'rotated', '-1', 'rotated_at', redis.call('TIME')[1])
redis.call('XGROUP', 'CREATE', KEYS[1], 'flush', '0', 'MKSTREAM')
local last_member = 3 + tonumber(ARGV[3])
for i = 4, last_member do redis.call('HSET', KEYS[2], ARGV[i], '1') end
redis.call('HSET', KEYS[7], '', '0')
for i = last_member + 1, #ARGV do redis.call('HSET', KEYS[7], ARGV[i], '0') end
return ARGV[1]
