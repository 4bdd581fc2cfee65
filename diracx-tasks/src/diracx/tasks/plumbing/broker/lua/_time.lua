-- Time of the server's clock, in µs since the epoch; the clocks of clients may differ. Constant within a script.
local moment_us
local function now_us()
  if not moment_us then
    local t = redis.call('TIME')
    moment_us = tonumber(t[1]) * 1000000 + tonumber(t[2])
  end
  return moment_us
end

-- Doubles hold µs exactly, but tostring() would round them.
local function int(number)
  return string.format('%.0f', number)
end

local function in_ms(us)
  return string.format('%.3f', us / 1000)
end

-- Removes expired members of a sorted set, those with a score of at most `up_to`: up to `AT_ONCE` of them, the rest in
-- later calls.
local AT_ONCE = 500
local function trim(key, up_to)
  local expired = redis.call('ZCOUNT', key, '-inf', up_to)
  if expired > 0 then redis.call('ZREMRANGEBYRANK', key, 0, math.min(expired, AT_ONCE) - 1) end
end
