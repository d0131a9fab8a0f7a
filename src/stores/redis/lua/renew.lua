-- Gives a plain hold a new lease.
-- KEYS: the lock. ARGV: how its value begins, the number of this write, the lease in ms.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local v = redis.call('GET', KEYS[1])
if not v then return {now} end
if string.sub(v, 1, #ARGV[1]) == ARGV[1] then
  local n, fence, owner = string.match(v, '^(%d+) %d+ (%d+) (.*)$', #ARGV[1] + 1)
  if n and tonumber(n) < tonumber(ARGV[2]) then
    local value = ARGV[1] .. ARGV[2] .. ' ' .. string.format('%.0f', now + ARGV[3]) .. ' ' .. fence .. ' ' .. owner
    local done = redis.pcall('SET', KEYS[1], value, 'PX', ARGV[3])
    if done.err then
      -- Where memory is full, PEXPIRE is allowed, and a script that has written may go on.
      if string.find(done.err, 'OOM ', 1, true) then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
      redis.call('SET', KEYS[1], value, 'PX', ARGV[3])
    end
    return {now, tonumber(fence)}
  end
end
local ttl = redis.call('PTTL', KEYS[1])
if string.sub(v, 1, 4) == 'nb1 ' then return {now, ttl, v} end
return {now, ttl, redis.sha1hex(string.sub(v, 1, 4096)) .. '.' .. #v, 1}
