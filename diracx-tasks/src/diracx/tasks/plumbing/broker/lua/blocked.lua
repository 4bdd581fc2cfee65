-- Publishes the task that blocks the event loop of a worker, and its running tasks; called by its watchdog.
-- KEYS: none. ARGV: worker, the blocking task (msgpack) or '' when the loop goes on, the running tasks (msgpack).
-- Returns nothing.
-- #flags allow-oom
-- #include _time
local REPORT_MS = 3600000
local report, now_ms = '$REPORT_PREFIX' .. ARGV[1], math.floor(now_us() / 1000)
if ARGV[2] == '' then
  redis.call('HDEL', report, 'blocked')
else
  redis.call('HSET', report, 'blocked', ARGV[2], 'running', ARGV[3])
  redis.call('PEXPIRE', report, REPORT_MS)
  redis.call('ZADD', '$REPORTING', int(now_ms), ARGV[1])
  redis.call('PEXPIRE', '$REPORTING', REPORT_MS)
end
