-- A worker that stops cleanly takes its name off every list. Messages that it still holds stay for others to reclaim,
-- and its locks with them. Without messages it needs no lock: one that it got without hearing of it is given back.
-- KEYS: none. ARGV: consumer, every stream (msgpack list). Returns 1 when nothing of it is left.
-- #flags allow-oom
-- #include _time _lines _locks _queue _looks _wake
redis.call('UNLINK', '$WAIT_PREFIX' .. ARGV[1])
local MOST = 150 -- locks that one call gives back: more are left to others, as those of the dead are
local held = '$HELD_PREFIX' .. ARGV[1]
local lines = redis.pcall('HRANDFIELD', held, MOST + 1, 'WITHVALUES')
local locks = locks_in(lines.err and {} or lines) -- a key of another type is no record
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
