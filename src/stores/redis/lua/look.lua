-- What is at each of the keys: nothing (false), a record, another string, or something else (0).
local t = redis.call('TIME')
local found = {t[1] * 1000 + math.floor(t[2] / 1000)}
for i, key in ipairs(KEYS) do
  local kind = redis.call('TYPE', key).ok
  if kind == 'none' then
    found[i + 1] = false
  elseif kind ~= 'string' then
    found[i + 1] = 0
  else
    local ttl = redis.call('PTTL', key)
    if redis.call('GETRANGE', key, 0, 3) == 'nb1 ' then
      found[i + 1] = {ttl, redis.call('GET', key)}
    else
      local first = redis.call('GETRANGE', key, 0, 4095)
      found[i + 1] = {ttl, redis.sha1hex(first) .. '.' .. redis.call('STRLEN', key), 1}
    end
  end
end
return found
