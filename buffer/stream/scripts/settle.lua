#!lua flags=allow-oom
-- Settle: forget what Postgres has. Only the shard's owner calls it, and only after the commit.
--
-- KEYS  1 stream   2 state   then for each conversation: tail, lease
-- ARGV  1 epoch    2 mark before   3 mark after   4 bytes   then for each conversation: its items
-- Reply the mark. Entries (before, after] leave the stream and their conversations' tails in one step;
--       when the mark is not `before`, another call settled them (or Redis lost one): nothing happens.
--
-- A full Redis must let this run, or it would stay full: it only ever frees memory.

local state = redis.call('HMGET', KEYS[2], 'epoch', 'mark')
if state[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (state[1] or 'none')) end
if state[2] ~= ARGV[2] then return state[2] end

for i = 5, #ARGV do
  local tail, lease = KEYS[2 * i - 7], KEYS[2 * i - 6]
  redis.call('LTRIM', tail, ARGV[i], -1)
  redis.call('DEL', lease)
end
local id = ARGV[1] .. '-' .. ARGV[3]
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%s-%.0f', ARGV[1], tonumber(ARGV[3]) + 1))
redis.call('XGROUP', 'SETID', KEYS[1], 'flush', id, 'ENTRIESREAD', string.format('%.0f', tonumber(ARGV[3]) + 1))
redis.call('HINCRBY', KEYS[2], 'bytes', '-' .. ARGV[4])
redis.call('HSET', KEYS[2], 'mark', ARGV[3])
return ARGV[3]
