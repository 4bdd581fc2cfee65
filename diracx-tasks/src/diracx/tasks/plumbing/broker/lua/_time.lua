-- The server's clock, in µs since the epoch. Two machines agree on it; their own clocks may differ.
local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- Doubles hold µs exactly, but tostring() would round them.
local function int(number)
  return string.format('%.0f', number)
end
