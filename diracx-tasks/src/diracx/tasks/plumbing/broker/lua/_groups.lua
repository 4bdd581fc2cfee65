-- Callback groups. `diracx:groups:{id}` is a hash (callback_stream, callback, failure_stream, failure,
-- total, failed); `diracx:groups:{id}:pending` the set of children that have not ended. A set, not a counter:
-- a child that ends twice is subtracted once.
local function fire(group)
  local key = '$GROUPS_PREFIX' .. group
  local failed = tonumber(redis.call('HGET', key, 'failed') or '0')
  local which = failed > 0 and 'failure' or 'callback'
  local stored = redis.call('HMGET', key, which .. '_stream', which)
  if stored[1] then
    enqueue(stored[1], stored[2])
    redis.call('DEL', key)
  end
  return stored[1] and 1 or 0
end

local function child_done(group, child, failed)
  local key = '$GROUPS_PREFIX' .. group
  local pending = key .. ':pending'
  if redis.call('SREM', pending, child) == 0 then return end
  if failed then redis.call('HINCRBY', key, 'failed', 1) end
  if redis.call('SCARD', pending) == 0 then return fire(group) end
  local ttl_ms = redis.call('HGET', key, 'ttl_ms')
  if ttl_ms then
    redis.call('PEXPIRE', key, ttl_ms)
    redis.call('PEXPIRE', pending, ttl_ms)
  end
end
