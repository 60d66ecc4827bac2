#!lua flags=no-writes
-- Follow: from where on somebody who reads the stream as it grows sees everything.
--
-- KEYS  1 stream   2 shard
-- ARGV  1 epoch    2 the caller's member field
-- Reply the last sequence that was given out so far, or "-1"

local shard = redis.call('HMGET', KEYS[2], 'epoch', ARGV[2])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[2] then return redis.error_reply('REFUSED member') end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then
    return string.match(info[i + 1], '^' .. ARGV[1] .. '%-(%d+)$') or '-1'
  end
end
return '-1'
