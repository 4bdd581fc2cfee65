-- Pause or resume schedules. A paused one keeps its next run, which may pass; the leader is notified of a resumption.
-- KEYS: none. ARGV: 1 to pause or 0 to resume, ids (msgpack list).
-- Returns for each 1 if its state has changed, else 0.
-- #flags allow-oom
-- #include _time
local replies, resumed = {}, false
for position, id in ipairs(cmsgpack.unpack(ARGV[2])) do
  if ARGV[1] == '1' then
    replies[position] = redis.call('HSETNX', '$PAUSED', id, int(math.floor(now_us() / 1000)))
  else
    replies[position] = redis.call('HDEL', '$PAUSED', id)
    resumed = resumed or replies[position] == 1
  end
end
if resumed then redis.pcall('PUBLISH', '$WAKE_SCHEDULER', 'resumed') end
return replies
