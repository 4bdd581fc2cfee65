-- Fencing tokens: each grant of locks has one, greater than those of all grants before it. `$FENCE` is the last one.
-- They are µs since the epoch, so that they rise also when the server has lost its data.
local FENCE_MS = 86400000 -- a clock that is set back by more would be seen by everybody

-- So many tokens for the caller: the first of them.
local function take_tokens(number, now)
  local last = redis.pcall('GET', '$FENCE')
  local first = math.max(type(last) == 'string' and tonumber(last) or 0, now) + 1
  redis.call('SET', '$FENCE', int(first + number - 1), 'PX', FENCE_MS)
  return first
end
