#!lua
-- Append: take operations into one shard, each whole or not at all.
--
-- KEYS  1 stream   2 shard   3 ids   4 ids.old   5 leases
-- ARGV  1 epoch    2 the caller's member field    then for each operation:
--         conversation, as tenant/conversation
--         number of items
--         expected last position: "" any; "<seq>" of this epoch; "-" none of this epoch
--         only if one is expected: the caller's lease token, or ""
--         and for each item: id digest, body digest (8 bytes), header, payload
--         The header ends open: the sequence of the conversation's unflushed item before it is added.
--         An erasure (kind "e") is an item without a payload.
-- Reply the flushed-through sequence, then for each operation one string:
--         "<seq>"           appended; its items are seq, seq+1, ...
--         "d<seq>,<seq>.."  every id is known with the same body
--         "c<i>,<i>.."      conflict: these items (1..) are known, with another body or only partly
--         "p<seq>"          the last position is another one
--         "l"               nothing here knows the last position; look it up under a lease
--         "w"               the conversation is erased, and Postgres does not know it yet: wait for that
--
-- Every check of an operation comes before its first write: a script has no rollback. The payload is
-- opaque. Without the `#!lua` line Redis may let a script write past maxmemory; with it, one that
-- begins over the limit is refused whole. Commands are the cost here (1 to 3 us each, more than
-- what they do), so all look-ups of a call are made at once, and an item costs one XADD.

local call, sub = redis.call, string.sub
local A, argc, epoch = ARGV, #ARGV, ARGV[1]

-- What the call will touch: conversations, ids.
local fields, digests = { 'epoch', 'mark', 'bytes', A[2], 'erased' }, {}
local operations, items = 5, 0
local at = 3
while at <= argc do
  operations = operations + 1
  fields[operations] = A[at]
  local n = tonumber(A[at + 1])
  at = at + (A[at + 2] == '' and 3 or 4)
  for i = at, at + 4 * n - 4, 4 do
    items = items + 1
    digests[items] = A[i]
  end
  at = at + 4 * n
end
local shard = call('HMGET', KEYS[2], unpack(fields))
if shard[1] ~= epoch then
  return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none'))
end
if not shard[4] then return redis.error_reply('REFUSED member') end
local known = call('HMGET', KEYS[3], unpack(digests))
local older = call('HMGET', KEYS[4], unpack(digests))

local stream, star, skip = KEYS[1], epoch .. '-*', #epoch + 2
local reply = { shard[2] }
local fresh, tails = {}, {}          -- what this very call added: id to value, conversation to last sequence
local window, windowed = {}, 0       -- field, value pairs to be written
local changes, changed = { 'bytes', '' }, 2
local bytes, mark = tonumber(shard[3]), tonumber(shard[2])
local erasing = tonumber(shard[5] or '-1') > mark  -- some conversation of the shard

-- Where the conversation was last erased, if within the window: kept with the ids, as long as they are.
local function erased(conversation)
  local field = '!' .. conversation
  local at = fresh[field] or call('HGET', KEYS[3], field) or call('HGET', KEYS[4], field)
  return at and tonumber(at)
end

local item, operation = 0, 5
at = 3
while at <= argc do
  local conversation, n, expected, token = A[at], tonumber(A[at + 1]), A[at + 2], nil
  at = at + 3
  if expected ~= '' then
    token = A[at]
    at = at + 1
  end
  operation = operation + 1
  local last = tails[conversation] or shard[operation]

  -- What comes after an erasure is new, once Postgres knows of the erasure: until then Postgres would
  -- take an id from before it for a repeat.
  local seen, clash, floor = nil, nil, nil
  if erasing then floor = erased(conversation) or false end
  for i = at, at + 4 * n - 4, 4 do
    item = item + 1
    local value = fresh[A[i]] or known[item] or older[item]
    if value then
      if floor == nil then floor = erased(conversation) or false end
      if floor and tonumber(sub(value, 9)) < floor then value = nil end
    end
    if value then
      if sub(value, 1, 8) == A[i + 1] then
        seen = seen or {}
        seen[#seen + 1] = sub(value, 9)
      else
        clash = clash or {}
        clash[#clash + 1] = (i - at) / 4 + 1
      end
    end
  end

  local answer
  if clash or (seen and #seen < n) then
    answer = 'c' .. table.concat(clash or {}, ',')
  elseif seen then
    answer = 'd' .. table.concat(seen, ',')
  elseif floor and floor > mark then
    answer = 'w'
  elseif expected ~= '' and last then
    if last ~= expected then answer = 'p' .. last end
  elseif expected ~= '' and (token == '' or call('HGET', KEYS[5], conversation) ~= token) then
    answer = 'l'
  end

  if not answer then
    for i = at, at + 4 * n - 4, 4 do
      local header, payload = A[i + 2] .. (last or ''), A[i + 3]
      last = sub(call('XADD', stream, star, 'h', header, 'd', payload), skip)
      answer = answer or last
      local value = A[i + 1] .. last
      fresh[A[i]] = value
      window[windowed + 1] = A[i]
      window[windowed + 2] = value
      windowed = windowed + 2
      bytes = bytes + #header + #payload
      if payload == '' and sub(header, 1, 4) == '1/e/' then
        window[windowed + 1] = '!' .. conversation
        window[windowed + 2] = last
        windowed = windowed + 2
        fresh['!' .. conversation] = last
        changes[changed + 1] = 'erased'
        changes[changed + 2] = last
        changed = changed + 2
        erasing = true
      end
    end
    tails[conversation] = last
    changes[changed + 1] = conversation
    changes[changed + 2] = last
    changed = changed + 2
  end
  at = at + 4 * n
  reply[operation - 4] = answer
end

if windowed > 0 then
  call('HSET', KEYS[3], unpack(window))
  changes[2] = string.format('%.0f', bytes)
  call('HSET', KEYS[2], unpack(changes))
end
return reply
