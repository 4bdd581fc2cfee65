-- Shortest interval between two polls of the same line that grant nothing (ms).
local POLLS_PER_SECOND = 100
local function quiet_ms()
  local lines = redis.pcall('ZCARD', '$LINES')
  return type(lines) == 'number' and lines * 1000 / POLLS_PER_SECOND or 0
end

-- A line whose next poll is later than this (ms) got its time before the clock was set back.
local LATEST_MS = 1200000
local function latest_poll(now)
  return now + math.max(LATEST_MS, 2 * quiet_ms())
end
