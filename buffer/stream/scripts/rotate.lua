#!lua flags=allow-oom
-- Rotate: age the idempotency window by one generation, when it is time.
--
-- KEYS  1 stream   2 shard   3 ids   4 ids.old   5 leases   6 fills
-- ARGV  1 epoch    2 window in seconds
-- Reply 1 if it rotated. The old generation goes only when the window has passed since the last rotation
--       and everything that it holds is flushed: an unflushed id is never forgotten. So an id is
--       remembered for one to two windows. Leases and claims that nobody used go with it; their holders ask again.
--       A full Redis lets this run: it only frees memory.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'mark', 'rotated', 'rotated_at')
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
local now = tonumber(redis.call('TIME')[1])
if now - tonumber(shard[4]) < tonumber(ARGV[2]) then return 0 end
if tonumber(shard[2]) < tonumber(shard[3]) then return 0 end

redis.call('UNLINK', KEYS[4], KEYS[5], KEYS[6])
if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('RENAME', KEYS[3], KEYS[4]) end
local info, last = redis.call('XINFO', 'STREAM', KEYS[1]), '-1'
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then
    last = string.match(info[i + 1], '^' .. ARGV[1] .. '%-(%d+)$') or '-1'
  end
end
redis.call('HSET', KEYS[2], 'rotated', last, 'rotated_at', string.format('%.0f', now))
return 1
