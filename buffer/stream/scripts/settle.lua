#!lua flags=allow-oom
-- Settle: forget what Postgres has. Only the shard's owner calls it, and only after the commit.
--
-- KEYS  1 stream   2 shard   3 leases
-- ARGV  1 epoch    2 mark before   3 mark after   4 bytes   then the conversations of these entries
-- Reply the mark. Entries (before, after] leave the stream and their conversations' tails in one step;
--       when the mark is not `before`, another call settled them (or Redis lost one): nothing happens.
--
-- A full Redis must let this run, or it would stay full: it only ever frees memory.

local conversations = { unpack(ARGV, 5) }
local shard = redis.call('HMGET', KEYS[2], 'epoch', 'mark', unpack(conversations))
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if shard[2] ~= ARGV[2] then return shard[2] end

local after, flushed = tonumber(ARGV[3]), {}
for i, conversation in ipairs(conversations) do
  local last = shard[i + 2]
  if last and tonumber(last) <= after then flushed[#flushed + 1] = conversation end
end
if #flushed > 0 then redis.call('HDEL', KEYS[2], unpack(flushed)) end
redis.call('HDEL', KEYS[3], unpack(conversations))

local next_sequence = string.format('%.0f', after + 1)
redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1] .. '-' .. next_sequence)
redis.call('XGROUP', 'SETID', KEYS[1], 'flush', ARGV[1] .. '-' .. ARGV[3], 'ENTRIESREAD', next_sequence)
redis.call('HINCRBY', KEYS[2], 'bytes', '-' .. ARGV[4])
redis.call('HINCRBY', KEYS[2], 'settled', ARGV[4])
redis.call('HSET', KEYS[2], 'mark', ARGV[3])
return ARGV[3]
