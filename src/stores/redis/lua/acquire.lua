-- Makes a record where there is none.
-- KEYS: the lock, its counter of fences.
-- ARGV: the holder, the lease in ms, the owner, the moment in ms after which it is too late (or -).
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if ARGV[4] ~= '-' and now >= tonumber(ARGV[4]) then return now end
local v = redis.call('GET', KEYS[1])
if v then
  local ttl = redis.call('PTTL', KEYS[1])
  if string.sub(v, 1, 4) == 'nb1 ' then return {now, ttl, v} end
  return {now, ttl, redis.sha1hex(string.sub(v, 1, 4096)) .. '.' .. #v, 1}
end
local f = t[1] * 1000000 + t[2]
local last = tonumber(redis.call('GET', KEYS[2]) or 0) or 0
if last >= f and last < 9007199254740991 then f = last + 1 end
local fence = string.format('%.0f', f)
redis.call('SET', KEYS[2], fence, 'PX', 86400000)
redis.call('SET', KEYS[1], ARGV[1] .. string.format('%.0f', now + ARGV[2]) .. ' ' .. fence .. ' ' .. ARGV[3], 'PX', ARGV[2])
return {now, f}
