#!lua flags=no-writes
-- Read: the newest unflushed entries of a conversation and its view, as one atomic picture.
--
-- KEYS  1 stream   2 shard   3 view
-- ARGV  1 epoch    2 conversation   3 most entries to return   4 the caller's member field
--       5 most items of the view to return   6 how many bytes these are likely to have
-- Reply the mark, the sequence at which to go on for older entries, or "", then the view's front, its newest
--       items, and 1 if it holds older ones (without a view: "", "", 0);
--       then the entries as `tail.lua` gives them.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'mark', ARGV[2], ARGV[4])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[4] then return redis.error_reply('REFUSED member') end

local mark, sequence = tonumber(shard[2]), shard[3] or ''
local reply = { shard[2], '', '', '', 0 }
for _ = 1, tonumber(ARGV[3]) do
  if sequence == '' or tonumber(sequence) <= mark then break end
  local id = ARGV[1] .. '-' .. sequence
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then return redis.error_reply('MISSING entry ' .. id) end
  reply[#reply + 1] = { id, entry[2][2], entry[2][4] }
  sequence = string.match(entry[2][2], '([^/]*)$')
end
if sequence ~= '' and tonumber(sequence) > mark then reply[2] = sequence end

-- Most views are longer than what is asked for: so their end is read first, as long as it is likely to be.
local sub = string.sub
local wanted, length = tonumber(ARGV[5]), tonumber(ARGV[6])
local view = redis.call('GETRANGE', KEYS[3], -length, -1)
if view == '' then return reply end
local at, count, taken
repeat
  at, count, taken = #view, tonumber(sub(view, -7, -2)), 0
  while count > 0 and taken < wanted do
    at = at - 17 - tonumber(sub(view, at - 14, at - 7))
    if at < 17 then break end
    count, taken = tonumber(sub(view, at - 6, at - 1)), taken + 1
  end
  local enough = count == 0 or taken == wanted
  if not enough then view = redis.call('GET', KEYS[3]) end
until enough

local front = redis.call('GETRANGE', KEYS[3], 0, 1031)
local front_length = tonumber(sub(front, 1, 8))
if front_length > 1024 then front = redis.call('GETRANGE', KEYS[3], 0, 7 + front_length) end
reply[3] = sub(front, 9, 8 + front_length)
reply[4] = sub(view, at + 1)
reply[5] = count > 0 and 1 or 0
return reply
