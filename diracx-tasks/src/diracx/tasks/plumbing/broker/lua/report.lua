-- What a worker tells those who look: that it lives, what it runs, and what ended since it last said so.
-- KEYS: none. ARGV: worker, number of the report, its line or '' (as before), what it runs or '' (as before),
--   what is added (msgpack) or '', 1 when it signs off. Added may be
--   stats    = {name of a task = {counter = number}}   into the buckets of this minute and this hour
--   ended    = {stream = number of executions}         for the rate at which a queue is worked off
--   failures = list of msgpack strings                 into the stream of failures
--   locks    = list of lines, `{kind} {limit} {window in µs} {key}`, of limiters and of locks that refused.
-- Returns {now (ms), 1 if what it said before is still known}. A report that comes again adds nothing.
-- #include _time
local ALIVE_MS, SAID_MS, MINUTES_MS, HOURS_MS = 120000, 3600000, 4200000, 90000000
local FAILURES, FAILURES_MS, LOCKS, LOCKS_MS = 500, 604800000, 1000, 86400000
local worker, now_ms = ARGV[1], math.floor(now_us() / 1000)
local said = '$REPORT_PREFIX' .. worker
local minute, hour = int(math.floor(now_ms / 60000)), int(math.floor(now_ms / 3600000))
local known = redis.call('EXISTS', said)
local repeated = redis.call('HGET', said, 'number') == ARGV[2]

if ARGV[6] == '1' then
  redis.call('DEL', said)
  redis.call('ZREM', '$REPORTING', worker)
else
  redis.call('HSET', said, 'number', ARGV[2])
  if ARGV[3] ~= '' then redis.call('HSET', said, 'line', ARGV[3]) end
  if ARGV[4] ~= '' then redis.call('HSET', said, 'running', ARGV[4]) end
  redis.call('PEXPIRE', said, SAID_MS)
  redis.call('ZADD', '$REPORTING', int(now_ms), worker)
  redis.call('ZREMRANGEBYSCORE', '$REPORTING', '-inf', int(now_ms - ALIVE_MS))
  redis.call('PEXPIRE', '$REPORTING', ALIVE_MS)
end

-- How much has ever come into each queue: the first report of a minute notes it, and differences are rates.
local flow = '$FLOW_PREFIX' .. minute
if redis.call('HEXISTS', flow, 'at') == 0 then
  redis.call('HSET', flow, 'at', int(now_ms))
  for _, stream in ipairs(cmsgpack.unpack(ARGV[7])) do
    local added = 0
    if redis.call('EXISTS', stream) == 1 then
      local info = redis.call('XINFO', 'STREAM', stream)
      for field = 1, #info, 2 do
        if info[field] == 'entries-added' then added = info[field + 1] end
      end
    end
    local length = redis.call('XLEN', stream) + redis.call('XLEN', stream .. '$HANDOVER')
    redis.call('HSET', flow, stream .. ' added', added, stream .. ' length', length)
  end
  redis.call('PEXPIRE', flow, MINUTES_MS)
end

local function add_up(bucket, lives_ms, stats)
  for name, counters in pairs(stats) do
    local stored = redis.call('HGET', bucket, name)
    local sums = stored and cmsgpack.unpack(stored) or {}
    for counter, number in pairs(counters) do sums[counter] = (sums[counter] or 0) + number end
    redis.call('HSET', bucket, name, cmsgpack.pack(sums))
  end
  redis.call('PEXPIRE', bucket, lives_ms)
end

if ARGV[5] ~= '' and not repeated then
  local added = cmsgpack.unpack(ARGV[5])
  if added.stats then
    add_up('$MINUTE_PREFIX' .. minute, MINUTES_MS, added.stats)
    add_up('$HOUR_PREFIX' .. hour, HOURS_MS, added.stats)
  end
  for stream, number in pairs(added.ended or {}) do redis.call('HINCRBY', flow, stream .. ' ended', number) end
  for _, failure in ipairs(added.failures or {}) do
    redis.call('XADD', '$FAILURES', 'MAXLEN', '~', FAILURES, '*', 'data', failure)
  end
  if added.failures then redis.call('PEXPIRE', '$FAILURES', FAILURES_MS) end
  for _, line in ipairs(added.locks or {}) do redis.call('ZADD', '$LOCKS_SEEN', int(now_ms), line) end
  if added.locks then
    redis.call('ZREMRANGEBYSCORE', '$LOCKS_SEEN', '-inf', int(now_ms - LOCKS_MS))
    redis.call('ZREMRANGEBYRANK', '$LOCKS_SEEN', 0, -LOCKS - 1)
    redis.call('PEXPIRE', '$LOCKS_SEEN', LOCKS_MS)
  end
end
return {int(now_ms), known}
