#!lua flags=allow-oom
-- Rotate: age the idempotency window by one generation, when it is time.
--
-- KEYS  1 stream   2 state   3 ids   4 ids.old
-- ARGV  1 epoch    2 window in seconds
-- Reply 1 if it rotated. The old generation goes only when the window has passed since the last rotation
--       and everything that it holds is flushed: an unflushed id is never forgotten. So an id is
--       remembered for one to two windows. A full Redis lets this run: it only frees memory.

local state = redis.call('HMGET', KEYS[2], 'epoch', 'mark', 'rotated', 'rotated_at')
if state[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (state[1] or 'none')) end
local now = tonumber(redis.call('TIME')[1])
if now - tonumber(state[4]) < tonumber(ARGV[2]) then return 0 end
if tonumber(state[2]) < tonumber(state[3]) then return 0 end

redis.call('UNLINK', KEYS[4])
if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('RENAME', KEYS[3], KEYS[4]) end
local last = redis.call('XINFO', 'STREAM', KEYS[1])
local fields = {}
for i = 1, #last, 2 do fields[last[i]] = last[i + 1] end
local id = fields['last-generated-id']
local sequence = string.match(id, '^' .. ARGV[1] .. '%-(%d+)$') or '-1'
redis.call('HSET', KEYS[2], 'rotated', sequence, 'rotated_at', string.format('%.0f', now))
return 1
