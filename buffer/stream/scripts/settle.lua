#!lua flags=allow-oom
-- Settle: forget what Postgres has. Only the shard's owner calls it, and only after the commit.
--
-- KEYS  1 stream   2 shard   3 leases   4 fills   then the views of these entries' conversations
-- ARGV  1 epoch    2 mark before   3 mark after   4 bytes
--       5 a view's time to live in ms   6 its most bytes   7 its most items
--       8 for each conversation what becomes of its view: "a" appended to, "n" begun, "x" dropped
--       then the conversations
-- Reply the mark. Entries (before, after] leave the stream and their conversations' tails, and enter the
--       views that are there, in one step; when the mark is not `before`, another call settled them (or
--       Redis lost one): nothing happens.
--
-- A full Redis must let this run, or it would stay full: where it is nearly full, all views are dropped, and
-- it only ever frees memory. The format of a view is that of `buffer/stream/views.py`.

local call, sub, format, match = redis.call, string.sub, string.format, string.match
local conversations = { unpack(ARGV, 9) }
local shard = call('HMGET', KEYS[2], 'epoch', 'mark', unpack(conversations))
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if shard[2] ~= ARGV[2] then return shard[2] end
local before, after = tonumber(ARGV[2]), tonumber(ARGV[3])
local most_bytes, most_items = tonumber(ARGV[6]), tonumber(ARGV[7])

-- Keep the newest items of a view that has grown too long.
local function shorten(key)
  local view = call('GET', key)
  local front_end = 8 + tonumber(sub(view, 1, 8))
  local kept, bytes, at, full = {}, 0, #view, false
  while at > front_end and not full do
    local from = at - 17 - tonumber(sub(view, at - 14, at - 7))
    bytes = bytes + at - from
    full = full or #kept >= most_items or bytes > most_bytes / 2
    if not full then kept[#kept + 1] = sub(view, from + 1, at - 7) end
    at = from
  end
  local parts = { sub(view, 1, 8), full and '0' or sub(view, 9, 9), sub(view, 10, front_end) }
  for i = #kept, 1, -1 do
    parts[#parts + 1] = kept[i]
    parts[#parts + 1] = format('%06d,', #kept - i + 1)
  end
  call('SET', key, table.concat(parts), 'KEEPTTL')
end

local NO_LAST, NO_SUMMARY, NO_FIRST, NO_ITEMS = '00000000', '00000000', '00000000', '000000,'

-- What this step adds to each view that is there, or begins.
local open, any, dropped = {}, false, {}
for i, conversation in ipairs(conversations) do
  local key, flag = KEYS[4 + i], sub(ARGV[8], i, i)
  if flag == 'x' then
    dropped[#dropped + 1] = key
  else
    local count = call('GETRANGE', key, -7, -2)
    local view = { key = key, count = tonumber(count) or 0, parts = {} }
    if count == '' and flag == 'n' then
      view.begins, view.front = true, '1' .. NO_LAST .. NO_SUMMARY
    elseif count == '000000' and call('GETRANGE', key, 8, 8) == '1'
        and call('GETRANGE', key, -15, -8) == NO_FIRST then
      view.front = call('GETRANGE', key, 8, -16)  -- it waits for the conversation's first item
    end
    if count ~= '' or view.begins then
      open[conversation] = view
      any = true
    end
  end
end
if #dropped > 0 then call('UNLINK', unpack(dropped)) end
if any then
  local first, begins, skip = ARGV[1] .. '-' .. format('%.0f', before + 1), '[' .. ARGV[1] .. ',', #ARGV[1] + 2
  for _, entry in ipairs(call('XRANGE', KEYS[1], first, ARGV[1] .. '-' .. ARGV[3])) do
    local header, data = entry[2][2], entry[2][4]
    local conversation, item, ms = match(header, '^1/i/([^/]+/[^/]+)/([^/]+)/[^/]*/(%d+)/')
    local view = open[conversation]
    if view then
      if string.find(item, '["\\]') then item = string.gsub(item, '["\\]', '\\%0') end
      local head = begins .. sub(entry[1], skip) .. ',"' .. item .. '",' .. ms .. ','
      local length, parts = #head + #data + 1, view.parts
      view.count = view.count + 1
      if view.front and view.count == 1 then
        local front = view.front .. NO_FIRST .. NO_ITEMS
        if length <= 8192 then
          front = view.front .. format('%08d', length) .. head .. data .. ']' .. NO_ITEMS
        end
        parts[1] = format('%08d', #front) .. front
      end
      local n = #parts
      parts[n + 1], parts[n + 2], parts[n + 3] = head, data, format('],1%08d%06d,', length, view.count)
    end
  end
  for _, view in pairs(open) do
    local length
    if view.front then
      local whole = table.concat(view.parts)
      length = #whole
      call('SET', view.key, whole, 'KEEPTTL')
    else
      length = call('APPEND', view.key, table.concat(view.parts))
    end
    if view.begins then call('PEXPIRE', view.key, ARGV[5]) end
    if length > most_bytes or view.count >= 2 * most_items then shorten(view.key) end
  end
end

-- The tails.
local flushed = {}
for i, conversation in ipairs(conversations) do
  local last = shard[i + 2]
  if last and tonumber(last) <= after then flushed[#flushed + 1] = conversation end
end
if #flushed > 0 then call('HDEL', KEYS[2], unpack(flushed)) end
call('HDEL', KEYS[3], unpack(conversations))

-- Who fills a view from Postgres must have seen these entries there.
local fills = call('HMGET', KEYS[4], unpack(conversations))
for i, conversation in ipairs(conversations) do
  if fills[i] then
    call('HSET', KEYS[4], conversation, match(fills[i], '^[^/]*/[^/]*/') .. ARGV[3])
  end
end

local next_sequence = format('%.0f', after + 1)
call('XTRIM', KEYS[1], 'MINID', ARGV[1] .. '-' .. next_sequence)
call('XGROUP', 'SETID', KEYS[1], 'flush', ARGV[1] .. '-' .. ARGV[3], 'ENTRIESREAD', next_sequence)
call('HINCRBY', KEYS[2], 'bytes', '-' .. ARGV[4])
call('HINCRBY', KEYS[2], 'settled', ARGV[4])
call('HSET', KEYS[2], 'mark', ARGV[3])
return ARGV[3]
