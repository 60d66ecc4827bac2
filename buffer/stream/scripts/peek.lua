#!lua flags=no-writes
-- Peek: how much of a shard waits.
--
-- KEYS  1 stream   2 shard
-- Reply {epoch, mark, bytes, settled bytes, entries, header of the oldest entry}; epoch "" where there is no
--       grant

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'mark', 'bytes', 'settled')
if not shard[1] then return { '', '-1', '0', '0', 0, '' } end
local length, head = redis.call('XLEN', KEYS[1]), ''
if length > 0 then head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][2][2] end
return { shard[1], shard[2], shard[3], shard[4], length, head }
