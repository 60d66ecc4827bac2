#!lua flags=no-writes
-- Tail: the newest unflushed entries of a conversation, as one atomic picture.
--
-- KEYS  1 stream   2 shard
-- ARGV  1 epoch    2 conversation   3 most entries to return   4 begin at this sequence, or "" for the last
--       5 the caller's member field
-- Reply the mark, the sequence at which to go on for older ones, or "", then the entries, newest first, each
--       {id, header, payload}. Each header ends with the sequence of the conversation's entry before it;
--       what is at or before the flushed-through mark is not unflushed any more.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'mark', ARGV[2], ARGV[5])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[4] then return redis.error_reply('REFUSED member') end

local mark, sequence = tonumber(shard[2]), ARGV[4]
if sequence == '' then sequence = shard[3] or '' end
local reply = { shard[2], '' }
for _ = 1, tonumber(ARGV[3]) do
  if sequence == '' or tonumber(sequence) <= mark then return reply end
  local id = ARGV[1] .. '-' .. sequence
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then return redis.error_reply('MISSING entry ' .. id) end
  reply[#reply + 1] = { id, entry[2][2], entry[2][4] }
  sequence = string.match(entry[2][2], '([^/]*)$')
end
if sequence ~= '' and tonumber(sequence) > mark then reply[2] = sequence end
return reply
