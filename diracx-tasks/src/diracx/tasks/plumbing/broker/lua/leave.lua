-- Removes a stopping worker from all lists. Messages that it still holds, and its locks, are left for other workers to
-- reclaim. Without messages, its remaining locks are released: they were granted in a call whose reply was lost.
-- KEYS: none. ARGV: consumer, every stream (msgpack list). Returns 1 when nothing is left to reclaim, else 0.
-- #flags allow-oom
-- #include _time _lines _kinds _locks _queue _polls _wake
redis.call('UNLINK', '$WAIT_PREFIX' .. ARGV[1])
local MOST = 150 -- locks that one call releases: with more, other workers reclaim them as from a dead worker
local held = '$HELD_PREFIX' .. ARGV[1]
local lines = redis.pcall('HRANDFIELD', held, MOST + 1, 'WITHVALUES')
local locks = locks_in(lines.err and {} or lines) -- an error for a key of the wrong type
local clean = #lines <= 2 * MOST
for _, stream in ipairs(cmsgpack.unpack(ARGV[2])) do
  local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', 1, ARGV[1])
  if not pending.err then
    if pending[1] then
      clean = false
    else
      redis.call('XGROUP', 'DELCONSUMER', stream, '$GROUP', ARGV[1])
    end
  end
end
redis.call('ZREM', '$LEASES', ARGV[1])
if clean then
  redis.call('ZREM', '$ALIVE', ARGV[1])
  redis.call('UNLINK', held)
  release_all(locks)
else
  redis.call('ZADD', '$ALIVE', 0, ARGV[1])
end
return clean and 1 or 0
