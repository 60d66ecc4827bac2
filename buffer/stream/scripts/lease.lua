#!lua
-- Lease: the right to act on a last position that is about to be looked up in Postgres.
--
-- KEYS  1 shard   2 leases
-- ARGV  1 epoch   2 conversation   3 token   4 the caller's member field
-- Reply {"<seq>" of the last unflushed item, ""}, or {"", token of the lease}. Settling an item of the
--       conversation cancels it, so what was read from Postgres under it is still the last. Callers
--       share a lease that stands: if each took it from the one before, a crowd would never get on.

local shard = redis.call('HMGET', KEYS[1], 'epoch', ARGV[2], ARGV[4])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[3] then return redis.error_reply('REFUSED member') end
if shard[2] then return { shard[2], '' } end
redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
return { '', redis.call('HGET', KEYS[2], ARGV[2]) }
