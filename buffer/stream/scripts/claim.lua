#!lua
-- Claim: the right to fill a conversation's view from Postgres.
--
-- KEYS  1 shard   2 fills   3 view
-- ARGV  1 epoch   2 conversation   3 token   4 ms for which it counts   5 the caller's member field
-- Reply 1, or 0 if somebody else is filling it or has filled it. Kept as "<token>/<until>/<mark>": settling an
--       item of the conversation notes its mark there, dropping the view ends the claim.

local shard = redis.call('HMGET', KEYS[1], 'epoch', ARGV[5])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[2] then return redis.error_reply('REFUSED member') end
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local standing = redis.call('HGET', KEYS[2], ARGV[2])
if standing and now < tonumber(string.match(standing, '/(%d+)/')) then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3] .. '/' .. string.format('%.0f', now + ARGV[4]) .. '/')
return 1
