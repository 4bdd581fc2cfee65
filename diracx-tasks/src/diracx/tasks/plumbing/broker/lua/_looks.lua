-- How long no line is looked at once more for nothing (ms).
local LOOKS_PER_SECOND = 100
local function quiet_ms()
  local lines = redis.pcall('ZCARD', '$LINES')
  return type(lines) == 'number' and lines * 1000 / LOOKS_PER_SECOND or 0
end

-- A line that is to be looked at later than this (ms) was given its time before the clock was set back.
local LATEST_MS = 1200000
local function latest_look(now)
  return now + math.max(LATEST_MS, 2 * quiet_ms())
end
