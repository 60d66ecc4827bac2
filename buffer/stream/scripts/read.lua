#!lua flags=no-writes
-- Read: the newest unflushed entries of a conversation and its view, as one atomic picture.
--
-- KEYS  1 stream   2 shard   3 view
-- ARGV  1 epoch    2 conversation   3 most entries to return   4 the caller's member field
--       5 most items of the view to return
-- Reply the mark, the sequence at which to go on for older entries, or "", then the view's time to live in
--       ms, its front, its newest items, and 1 if it holds older ones (without a view: -2, "", "", 0);
--       then the entries as `tail.lua` gives them.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'mark', ARGV[2], ARGV[4])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[4] then return redis.error_reply('REFUSED member') end

local mark, sequence = tonumber(shard[2]), shard[3] or ''
local reply = { shard[2], '', -2, '', '', 0 }
for _ = 1, tonumber(ARGV[3]) do
  if sequence == '' or tonumber(sequence) <= mark then break end
  local id = ARGV[1] .. '-' .. sequence
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then return redis.error_reply('MISSING entry ' .. id) end
  reply[#reply + 1] = { id, entry[2][2], entry[2][4] }
  sequence = string.match(entry[2][2], '([^/]*)$')
end
if sequence ~= '' and tonumber(sequence) > mark then reply[2] = sequence end

local view = redis.call('GET', KEYS[3])
if view then
  local sub = string.sub
  local front_end = 8 + tonumber(sub(view, 1, 8))
  local at = #view
  for _ = 1, tonumber(ARGV[5]) do
    if at <= front_end then break end
    at = at - 17 - tonumber(sub(view, at - 14, at - 7))
  end
  reply[3] = redis.call('PTTL', KEYS[3])
  reply[4] = sub(view, 9, front_end)
  reply[5] = sub(view, at + 1)
  reply[6] = at > front_end and 1 or 0
end
return reply
