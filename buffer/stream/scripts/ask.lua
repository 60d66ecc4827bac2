#!lua flags=allow-oom
-- Ask: is Postgres away for all managers, so that none of them can judge this process dead?
--
-- KEYS  1 shard   2 managers
-- ARGV  1 epoch   2 the member's field
-- Reply {the number of this question, the highest number that all managers have answered}

local shard = redis.call('HMGET', KEYS[1], 'epoch', ARGV[2])
if shard[1] ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (shard[1] or 'none')) end
if not shard[2] then return redis.error_reply('REFUSED member') end
local question, answered = redis.call('HINCRBY', KEYS[2], '', 1), nil
local all = redis.call('HGETALL', KEYS[2])
for i = 1, #all, 2 do
  local value = tonumber(all[i + 1])
  if all[i] ~= '' and (not answered or value < answered) then answered = value end
end
return { question, answered or 0 }
