-- Makes a record where there is none. Answers the fence, which is the time in microseconds, or {the time in ms, the
-- fence} where that had to be larger.
-- KEYS: the lock, its counter of fences.
-- ARGV: the holder, the lease in ms, the owner, the moment in ms after which it is too late (or -).
local call, format = redis.call, string.format
local t = call('TIME')
local us = t[1] * 1000000 + t[2]
local now = math.floor(us / 1000)
if ARGV[4] ~= '-' and now >= tonumber(ARGV[4]) then return now end
local f = us
local last = tonumber(call('GET', KEYS[2]) or 0) or 0
if last >= f and last < 9007199254740991 then f = last + 1 end
local fence = format('%.0f', f)
local value = ARGV[1] .. format('%.0f', now + ARGV[2]) .. ' ' .. fence .. ' ' .. ARGV[3]
local set = redis.pcall('SET', KEYS[1], value, 'NX', 'PX', ARGV[2])
if not set or set.err then
  -- It is there. A server that takes no writes says so only where it is not.
  local v = call('GET', KEYS[1])
  if not v then return set end
  local ttl = call('PTTL', KEYS[1])
  if string.sub(v, 1, 4) == 'nb1 ' then return {now, ttl, v} end
  return {now, ttl, redis.sha1hex(string.sub(v, 1, 4096)) .. '.' .. #v, 1}
end
call('SET', KEYS[2], fence, 'PX', 86400000)
if f == us then return fence end
return {now, f}
