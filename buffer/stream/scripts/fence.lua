#!lua flags=allow-oom
-- Fence: end whatever grant there is, of an epoch that is over.
--
-- KEYS  1 stream   2 shard
-- ARGV  1 epoch    2 nonce
-- Reply {the fence that stands: "<epoch>/<nonce>/<the epoch whose grant it ended>", number of entries}.
--       A fence of the same epoch that stands already is left, so that managers who race agree on one.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'fence')
if shard[1] and tonumber(shard[1]) > tonumber(ARGV[1]) then
  return redis.error_reply('REFUSED epoch ' .. shard[1])
end
local fence = shard[2]
if not fence or tonumber(string.match(fence, '^%d+')) < tonumber(ARGV[1]) then
  fence = ARGV[1] .. '/' .. ARGV[2] .. '/' .. (shard[1] or '')
  redis.call('HSET', KEYS[2], 'fence', fence)
end
redis.call('HDEL', KEYS[2], 'epoch')
return { fence, redis.call('XLEN', KEYS[1]) }
