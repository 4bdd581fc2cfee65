-- Polls the lines of locks whose timer has ended: grants the lock to the first tasks, if it is free by now.
-- KEYS: none. ARGV: limit of lines.
-- Returns nothing.
-- #flags allow-oom
-- #include _time _lines _kinds _locks _queue _polls _wake
local now = now_us() / 1000
polling = true -- announces no due times: the caller gets them from promote.lua

local quiet = quiet_ms()

local function poll_line(key)
  local lock = {key = key}
  local grants = grants_of(lock)
  local reserved = reserved_until(grants)
  local heads, first = heads_of(lock, grants)
  if not first then return redis.call('ZREM', '$LINES', key) end
  lock.kind = string.match(first, '^[^:]+')
  local again = now + math.max(reserved and RESERVATION_MS + 1 or poll_delay(lock, POLL_MS), quiet)
  schedule_poll(key, reserved and math.min(reserved + 1, again) or again)
  grant_next(lock, 'timer', grants, heads, first)
end

local function poll_lines(from, to)
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', '$LINES', from, to, 'LIMIT', 0, ARGV[1])) do
    -- A key of the wrong type does not delay the other lines.
    if not pcall(poll_line, key) then schedule_poll(key, now + math.max(POLL_MS, quiet)) end
  end
end
poll_lines('-inf', string.format('%.3f', now))
poll_lines(string.format('(%.3f', latest_poll(now)), '+inf')
