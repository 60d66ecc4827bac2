#!lua
-- Grant: open a shard for an epoch. Every other script refuses a caller of another epoch.
--
-- KEYS  1 stream   2 shard
-- ARGV  1 epoch
-- Reply the epoch in force: this one, or a newer one that is there already

local epoch = redis.call('HGET', KEYS[2], 'epoch')
if epoch and tonumber(epoch) >= tonumber(ARGV[1]) then return epoch end
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'mark', '-1', 'bytes', '0', 'rotated', '-1', 'rotated_at', redis.call('TIME')[1])
redis.call('XGROUP', 'CREATE', KEYS[1], 'flush', '0', 'MKSTREAM')
return ARGV[1]
