#!lua
-- Summarize: put a new summary into a conversation's view.
--
-- KEYS  1 shard   2 fills   3 view
-- ARGV  1 epoch   2 conversation   3 summary
-- Reply 1 if there is a view. Without one, whoever fills it from an older snapshot may not.

local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch ~= ARGV[1] then return redis.error_reply('REFUSED epoch ' .. (epoch or 'none')) end
redis.call('HDEL', KEYS[2], ARGV[2])
local view = redis.call('GET', KEYS[3])
if not view then return 0 end
local sub, format = string.sub, string.format
local front_end = 8 + tonumber(sub(view, 1, 8))
local front = sub(view, 9, front_end)
local first_end = 9 + tonumber(sub(front, 2, 9))
local last_end = first_end + 8 + tonumber(sub(front, first_end + 1, first_end + 8))
front = sub(front, 1, last_end) .. format('%08d', #ARGV[3]) .. ARGV[3] .. '000000,'
redis.call('SET', KEYS[3], format('%08d', #front) .. front .. sub(view, front_end + 1), 'KEEPTTL')
return 1
