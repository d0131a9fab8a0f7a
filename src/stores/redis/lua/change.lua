-- Any change to a record that is there, as protocol::apply says.
-- KEYS: the lock, its counter of fences.
-- ARGV: the condition and its four arguments, the write and its seven, the moment in ms after which it is too late
-- (or -).
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
if ARGV[14] ~= '-' and now >= tonumber(ARGV[14]) then return now end
local v = redis.call('GET', KEYS[1])
if not v then return {now} end
local ttl = redis.call('PTTL', KEYS[1])
local function number(n) return string.format('%.0f', n) end

-- What is there. Only one of `token` and `owner` is set, and neither for what is not ours.
local token, n, owner, hold, count, entries, stored, fence, by
owner, hold, count, entries, stored, fence, by = string.match(v, '^nb1 r (%x*) (%S+) (%d+) (%S+) (%d+) (%d+) (.*)$')
if not owner then
  token, n, stored, fence, by = string.match(v, '^nb1 (%x+%.%d+) (%d+) (%d+) (%d+) (.*)$')
end
stored = tonumber(stored)

-- The entries but for the one that is written, and that one.
local kind, write = ARGV[1], ARGV[6]
local others, counted, before, written = {}, 0, nil, nil
if owner then
  local object = write == 'entry' and ARGV[7] or ARGV[4]
  for o, c, s in string.gmatch(entries, '(%x+):(%d+):(%d+)') do
    counted = counted + c
    if o == object then
      before, written = tonumber(c), tonumber(s)
    else
      others[#others + 1] = o .. ':' .. c .. ':' .. s
    end
  end
end

local holds = false
if kind == 'seen' then
  -- How the value begins; whether it has no end; whether it must be over.
  holds = string.sub(v, 1, #ARGV[2]) == ARGV[2] and (ttl == -1) == (ARGV[3] == 'endless')
    and (ARGV[4] ~= 'over' or ttl ~= -1 and stored and stored < now)
elseif kind == 'foreign' then
  -- What identifies the value; its end, which is reckoned from two readings of the clock.
  holds = redis.sha1hex(string.sub(v, 1, 4096)) .. '.' .. #v == ARGV[2] and ARGV[4] ~= 'over'
  if ARGV[3] == 'endless' then
    holds = holds and ttl == -1
  else
    holds = holds and ttl ~= -1 and math.abs(now + ttl - ARGV[3]) <= 10
  end
elseif kind == 'token' then
  holds = token == ARGV[2]
elseif kind == 'hold' then
  holds = token ~= nil and string.sub(token, 1, 33) == ARGV[2] .. '.'
elseif kind == 'owner' then
  holds = owner == ARGV[2] and hold == ARGV[3]
elseif kind == 'object' then
  holds = owner == ARGV[2] and hold == ARGV[3] and string.find(' ' .. string.gsub(entries, ',', ' '), ' ' .. ARGV[4] .. ':', 1, true) ~= nil
end
-- What a write of one's own numbers must carry a lower number.
if holds and kind ~= 'seen' and kind ~= 'foreign' then
  if write == 'extend' and token and ARGV[9] ~= '-' then
    holds = tonumber(n) < tonumber(ARGV[9])
  elseif write == 'entry' and ARGV[7] ~= '-' and owner then
    if written then holds = written < tonumber(ARGV[9]) else holds = ARGV[10] == 'add' end
  end
end
if write == 'entry' and not owner then holds = false end
if not holds then
  if string.sub(v, 1, 4) == 'nb1 ' then return {now, ttl, v} end
  return {now, ttl, redis.sha1hex(string.sub(v, 1, 4096)) .. '.' .. #v, 1}
end

if write == 'delete' then
  redis.call('DEL', KEYS[1])
  return {now, 0}
end
if write == 'put' then
  -- The holder, the lease in ms, the owner.
  local f = t[1] * 1000000 + t[2]
  local last = tonumber(redis.call('GET', KEYS[2]) or 0) or 0
  if last >= f and last < 9007199254740991 then f = last + 1 end
  redis.call('SET', KEYS[2], number(f), 'PX', 86400000)
  redis.call('SET', KEYS[1], ARGV[7] .. number(now + ARGV[8]) .. ' ' .. number(f) .. ' ' .. ARGV[9], 'PX', ARGV[8])
  return {now, f}
end

-- The new lease: its kind and length. `lasts` in ms; nil: as it is.
local lease, length = ARGV[11], tonumber(ARGV[12])
local lasts
if lease == 'from' or lease == 'later' and ttl ~= -1 and (stored or now + ttl) < now + length then
  lasts = length
end
local function set(value)
  local command = {'SET', KEYS[1], value, 'KEEPTTL'}
  if lasts then
    command = {'SET', KEYS[1], value, 'PX', lasts}
  end
  local done = redis.pcall(unpack(command))
  if not done.err then return end
  -- Where memory is full, PEXPIRE is allowed, and a script that has written may go on.
  if string.find(done.err, 'OOM ', 1, true) then
    redis.call('PEXPIRE', KEYS[1], lasts or ttl >= 0 and math.max(ttl, 1) or 86400000)
    if ttl == -1 and not lasts then command[4] = nil end
  end
  redis.call(unpack(command))
end
local ends = stored and number(lasts and now + lasts or stored)
if write == 'extend' then
  if token then
    set('nb1 ' .. token .. ' ' .. (ARGV[9] ~= '-' and ARGV[9] or n) .. ' ' .. ends .. ' ' .. fence .. ' ' .. by)
  elseif owner then
    set('nb1 r ' .. owner .. ' ' .. hold .. ' ' .. count .. ' ' .. entries .. ' ' .. ends .. ' ' .. fence .. ' ' .. by)
  elseif lasts then
    redis.call('PEXPIRE', KEYS[1], lasts)
  end
  return {now, tonumber(fence) or 0}
end

-- An entry: the object (-: what is beyond the entries), its count and number, whether it may be added, the name
-- that a hold without one gets.
local to = tonumber(ARGV[8])
if ARGV[7] == '-' then
  before = math.max(count - counted, 0)
elseif to > 0 then
  others[#others + 1] = ARGV[7] .. ':' .. ARGV[8] .. ':' .. ARGV[9]
end
local after = math.max(count + to - (before or 0), 0)
if after == 0 then
  redis.call('DEL', KEYS[1])
  return {now, 0}
end
if hold == '-' then hold = ARGV[13] end
local list = #others > 0 and table.concat(others, ',') or '-'
set('nb1 r ' .. owner .. ' ' .. hold .. ' ' .. number(after) .. ' ' .. list .. ' ' .. ends .. ' ' .. fence .. ' ' .. by)
return {now, tonumber(fence)}
