#!lua
-- Lease: the right to act on a last position that is about to be looked up in Postgres.
--
-- KEYS  1 state   2 tail   3 lease
-- ARGV  1 epoch   2 token  3 lifetime in milliseconds
-- Reply "<seq>" of the last unflushed item, or "" and the lease is the caller's. Settling an item of
--       the conversation cancels it, so what was read from Postgres under it is still the last.

if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return redis.error_reply('REFUSED epoch')
end
local last = redis.call('LINDEX', KEYS[2], -1)
if last then return last end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
return ''
