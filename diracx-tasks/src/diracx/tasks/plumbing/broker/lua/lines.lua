-- Look at the lines of locks whose timer has ended: grant the turn to the first, if the lock can be had by now.
-- KEYS: none. ARGV: the most lines to look at.
-- Returns nothing.
-- #flags allow-oom
-- #include _time _locks _queue _wake
local now = now_us() / 1000
looking = true -- and tells nobody when to look next: whoever asks, asks promote.lua after that

local function look_at_line(key)
  local waiting, turn_ms = '$WAITING_PREFIX' .. key, redis.call('PTTL', '$TURN_PREFIX' .. key)
  local first = redis.call('ZRANGE', waiting, 0, 0)[1]
  if not first then return redis.call('ZREM', '$LINES', key) end
  redis.call('PERSIST', waiting) -- earlier versions gave it a time to live
  local lock = {key = key, kind = string.match(first, '^%a+')}
  look_at(key, now + (turn_ms >= 0 and turn_ms + 1 or look_again_in(lock, LOOK_MS)))
  grant_next(lock, 'timer')
end

for _, key in ipairs(redis.call('ZRANGEBYSCORE', '$LINES', '-inf', string.format('%.3f', now), 'LIMIT', 0, ARGV[1])) do
  -- What is of another type holds up no other line.
  if not pcall(look_at_line, key) then look_at(key, now + LOOK_MS) end
end
