#!lua flags=no-writes
-- Tail: the newest unflushed entries of a conversation, as one atomic picture.
--
-- KEYS  1 stream   2 state   3 tail
-- ARGV  1 epoch    2 most entries to return   3 only entries before this sequence, or ""
-- Reply "1" if older entries remain, else "0", then the entries, oldest first, each {id, header, payload}

if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then
  return redis.error_reply('REFUSED epoch')
end
local count, most = redis.call('LLEN', KEYS[3]), tonumber(ARGV[2])
if ARGV[3] ~= '' then
  -- The tail is sorted: count the part before the bound by bisection.
  local bound, low, high = tonumber(ARGV[3]), 0, count
  while low < high do
    local middle = math.floor((low + high) / 2)
    if tonumber(redis.call('LINDEX', KEYS[3], middle)) < bound then low = middle + 1 else high = middle end
  end
  count = low
end
local first = math.max(0, count - most)
local reply = { first > 0 and '1' or '0' }
if count == 0 then return reply end

for _, sequence in ipairs(redis.call('LRANGE', KEYS[3], first, count - 1)) do
  local id = ARGV[1] .. '-' .. sequence
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if not entry then return redis.error_reply('MISSING entry ' .. id) end
  reply[#reply + 1] = { id, entry[2][2], entry[2][4] }
end
return reply
