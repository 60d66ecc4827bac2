#!lua flags=allow-oom
-- Probe: what stands in a shard.
--
-- KEYS  1 stream   2 shard
-- Reply {epoch of the grant or "", fence or "", mark, number of entries}. It writes nothing, but counts as a
--       writing script: so a server that refuses writes (a replica, or one that lacks its own) refuses it.

local shard = redis.call('HMGET', KEYS[2], 'epoch', 'fence', 'mark')
return { shard[1] or '', shard[2] or '', shard[3] or '-1', redis.call('XLEN', KEYS[1]) }
