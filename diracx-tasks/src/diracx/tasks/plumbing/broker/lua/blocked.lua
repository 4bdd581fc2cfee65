-- What a worker whose event loop is blocked has its watchdog say: what blocks it, and what else it runs.
-- KEYS: none. ARGV: worker, what blocks it (msgpack) or '' when nothing does any more, what it runs (msgpack).
-- Returns nothing.
-- #flags allow-oom
-- #include _time
local SAID_MS = 3600000
local said, now_ms = '$REPORT_PREFIX' .. ARGV[1], math.floor(now_us() / 1000)
if ARGV[2] == '' then
  redis.call('HDEL', said, 'blocked')
else
  redis.call('HSET', said, 'blocked', ARGV[2], 'running', ARGV[3])
  redis.call('PEXPIRE', said, SAID_MS)
  redis.call('ZADD', '$REPORTING', int(now_ms), ARGV[1])
  redis.call('PEXPIRE', '$REPORTING', SAID_MS)
end
