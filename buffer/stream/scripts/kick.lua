#!lua flags=allow-oom
-- Kick: a process that was judged dead is put out of the grant.
--
-- KEYS  1 stream   2 shard
-- ARGV  1 epoch    2 the member's field
-- Reply the last sequence that was given out so far, or "-1"

local epoch = redis.call('HGET', KEYS[2], 'epoch')
if epoch ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (epoch or 'none')) end
redis.call('HDEL', KEYS[2], ARGV[2])
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then
    return string.match(info[i + 1], '^' .. ARGV[1] .. '%-(%d+)$') or '-1'
  end
end
return '-1'
