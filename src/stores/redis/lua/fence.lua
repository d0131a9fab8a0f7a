-- The next fence. KEYS: the counter.
local t = redis.call('TIME')
local f = t[1] * 1000000 + t[2]
local last = tonumber(redis.call('GET', KEYS[1]) or 0) or 0
if last >= f and last < 9007199254740991 then f = last + 1 end
redis.call('SET', KEYS[1], string.format('%.0f', f), 'PX', 86400000)
return f
