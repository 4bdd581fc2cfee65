-- Look at the lines of locks whose timer has ended: grant the turn to the first, if the lock can be had by now.
-- KEYS: none. ARGV: the most lines to look at.
-- Returns nothing.
-- #flags allow-oom
-- #include _time _lines _locks _queue _looks _wake
local now = now_us() / 1000
looking = true -- and tells nobody when to look next: the caller asks promote.lua after that

local quiet = quiet_ms()

local function look_at_line(key)
  local lock = {key = key}
  local turns = turns_of(lock)
  local reserved = reserved_until(turns)
  local heads, first = heads_of(lock, turns)
  if not first then return redis.call('ZREM', '$LINES', key) end
  lock.kind = string.match(first, '^%a+')
  local again = now + math.max(reserved and TURN_MS + 1 or look_again_in(lock, LOOK_MS), quiet)
  look_at(key, reserved and math.min(reserved + 1, again) or again)
  grant_next(lock, 'timer', turns, heads, first)
end

local function look_at_lines(from, to)
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', '$LINES', from, to, 'LIMIT', 0, ARGV[1])) do
    -- What is of another type holds up no other line.
    if not pcall(look_at_line, key) then look_at(key, now + math.max(LOOK_MS, quiet)) end
  end
end
look_at_lines('-inf', string.format('%.3f', now))
look_at_lines(string.format('(%.3f', latest_look(now)), '+inf')
