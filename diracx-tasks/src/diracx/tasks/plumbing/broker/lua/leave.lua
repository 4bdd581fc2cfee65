-- A worker that stops cleanly takes its name off every list. What it still holds stays for others to reclaim.
-- KEYS: none. ARGV: consumer, every stream (msgpack list). Returns 1 when nothing of it is left.
-- #flags allow-oom
-- #include _time
local clean = true
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
if clean then
  redis.call('ZREM', '$ALIVE', ARGV[1])
  redis.call('DEL', '$HELD_PREFIX' .. ARGV[1])
else
  redis.call('ZADD', '$ALIVE', 0, ARGV[1])
end
return clean and 1 or 0
