#!lua
-- Append: take operations into one shard, each whole or not at all.
--
-- KEYS  1 stream   2 state   3 ids   4 ids.old   then tails and leases, as the operations name them
-- ARGV  1 epoch    then for each operation:
--         index of its conversation's tail in KEYS
--         number of items
--         expected last position: "" any; "<seq>" of this epoch; "-" none of this epoch
--         only if one is expected: index of the lease in KEYS, and the caller's token or ""
--         and for each item: id digest, body digest (8 bytes), header, payload
-- Reply the flushed-through sequence, then for each operation one string:
--         "<seq>"           appended; its items are seq, seq+1, ...
--         "d<seq>,<seq>.."  every id is known with the same body
--         "c<i>,<i>.."      conflict: these items (1..) are known, with another body or only partly
--         "p<seq>"          the last position is another one ("p" alone: there is none of this epoch)
--         "l"               nothing here knows the last position; look it up under a lease
--
-- Every check of an operation comes before its first write: a script has no rollback. The payload is
-- opaque. Without the `#!lua` line Redis may let a script write past maxmemory; with it, one that
-- begins over the limit is refused whole.

local state = redis.call('HMGET', KEYS[2], 'epoch', 'mark')
if state[1] ~= ARGV[1] then
  return redis.error_reply('REFUSED epoch ' .. (state[1] or 'none'))
end
local epoch = ARGV[1]

-- Look every id up at once, in both generations of the window.
local digests, at, argc = {}, 2, #ARGV
while at <= argc do
  local n = tonumber(ARGV[at + 1])
  at = at + (ARGV[at + 2] == '' and 3 or 5)
  for _ = 1, n do
    digests[#digests + 1] = ARGV[at]
    at = at + 4
  end
end
local known = redis.call('HMGET', KEYS[3], unpack(digests))
local older = redis.call('HMGET', KEYS[4], unpack(digests))

local reply = { state[2] }
local fresh = {}      -- ids that this very call added
local window = {}     -- field, value pairs for the window
local added = 0       -- bytes
local digest_at = 0
at = 2
while at <= argc do
  local tail, n, expected = KEYS[tonumber(ARGV[at])], tonumber(ARGV[at + 1]), ARGV[at + 2]
  local condition = at + 3
  local first = at + (expected == '' and 3 or 5)
  at = first + 4 * n

  local seen, clash = {}, {}
  for i = 1, n do
    local digest = ARGV[first + 4 * (i - 1)]
    local value = fresh[digest] or known[digest_at + i] or older[digest_at + i]
    if value then
      if string.sub(value, 1, 8) == ARGV[first + 4 * (i - 1) + 1] then
        seen[#seen + 1] = string.sub(value, 9)
      else
        clash[#clash + 1] = i
      end
    end
  end
  digest_at = digest_at + n

  local answer
  if #clash == 0 and #seen == n then
    answer = 'd' .. table.concat(seen, ',')
  elseif #clash > 0 or #seen > 0 then
    answer = 'c' .. table.concat(clash, ',')
  elseif expected ~= '' then
    local last = redis.call('LINDEX', tail, -1)
    if last then
      if last ~= expected then answer = 'p' .. last end
    else
      local lease, token = KEYS[tonumber(ARGV[condition])], ARGV[condition + 1]
      if token == '' or redis.call('GET', lease) ~= token then answer = 'l' end
    end
  end

  if not answer then
    local sequences = {}
    for i = 1, n do
      local header, payload = ARGV[first + 4 * (i - 1) + 2], ARGV[first + 4 * (i - 1) + 3]
      local id = redis.call('XADD', KEYS[1], epoch .. '-*', 'h', header, 'd', payload)
      local sequence = string.sub(id, #epoch + 2)
      local digest = ARGV[first + 4 * (i - 1)]
      local value = ARGV[first + 4 * (i - 1) + 1] .. sequence
      sequences[i] = sequence
      fresh[digest] = value
      window[#window + 1] = digest
      window[#window + 1] = value
      added = added + #header + #payload
    end
    redis.call('RPUSH', tail, unpack(sequences))
    answer = sequences[1]
  end
  reply[#reply + 1] = answer
end

if #window > 0 then
  redis.call('HSET', KEYS[3], unpack(window))
  redis.call('HINCRBY', KEYS[2], 'bytes', added)
end
return reply
