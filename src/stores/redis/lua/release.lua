-- Removes the record of a plain hold. Answers 0 then.
-- KEYS: the lock. ARGV: how its value begins.
local call = redis.call
local v = call('GET', KEYS[1])
if v and string.sub(v, 1, #ARGV[1]) == ARGV[1] then
  call('DEL', KEYS[1])
  return '0'
end
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if not v then return {now} end
local ttl = call('PTTL', KEYS[1])
if string.sub(v, 1, 4) == 'nb1 ' then return {now, ttl, v} end
return {now, ttl, redis.sha1hex(string.sub(v, 1, 4096)) .. '.' .. #v, 1}
