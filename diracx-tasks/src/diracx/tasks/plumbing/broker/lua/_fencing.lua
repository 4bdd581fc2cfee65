-- Fencing tokens: each grant of locks has a token greater than those of all earlier grants. `$FENCE` is the last one.
-- Tokens are µs since the epoch, so that they increase also after a loss of the server's data.
local FENCE_MS = 86400000 -- covers a clock that is set back by up to a day

-- Reserves `number` tokens, and returns the first.
local function take_tokens(number, now)
  local last = redis.pcall('GET', '$FENCE')
  local first = math.max(type(last) == 'string' and tonumber(last) or 0, now) + 1
  redis.call('SET', '$FENCE', int(first + number - 1), 'PX', FENCE_MS)
  return first
end
