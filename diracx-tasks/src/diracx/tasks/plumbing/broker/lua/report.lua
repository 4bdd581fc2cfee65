-- What a worker tells those who look: that it lives, what it runs, and what ended since it last said so.
-- KEYS: none. ARGV: worker, number of the report, its line or '' (as before), what it runs or '' (as before),
--   what is added (msgpack) or '', 1 when it signs off. Added may be
--   stats    = {name of a task = {counter = number}}   into the buckets of this minute and this hour
--   ended    = {stream = number of executions}         for the rate at which a queue is worked off
--   failures = list of msgpack strings                 into the stream of failures
--   locks    = list of lines, `{kind} {limit} {window in µs} {key}`, of limiters and of locks that refused.
-- Returns {now (ms), 1 if what it said before is still known}. A report that comes again adds nothing.
-- #flags allow-oom
-- #include _time
local SAID_MS, MINUTES_MS, HOURS_MS = 3600000, 4200000, 90000000
local FAILURES, FAILURES_MS, LOCKS, LOCKS_MS = 500, 604800000, 1000, 86400000
local worker, now_ms = ARGV[1], math.floor(now_us() / 1000)
local said = '$REPORT_PREFIX' .. worker
local minute, hour = int(math.floor(now_ms / 60000)), int(math.floor(now_ms / 3600000))
local before = redis.call('HMGET', said, 'number', 'minute')
local known, repeated, new_minute = before[1] and 1 or 0, before[1] == ARGV[2], before[2] ~= minute

if ARGV[6] == '1' then
  redis.call('DEL', said)
  redis.call('ZREM', '$REPORTING', worker)
else
  local fields = {}
  if ARGV[3] ~= '' then fields[#fields + 1] = 'line'; fields[#fields + 1] = ARGV[3] end
  if ARGV[4] ~= '' then fields[#fields + 1] = 'running'; fields[#fields + 1] = ARGV[4] end
  if fields[1] or ARGV[5] ~= '' or new_minute then
    redis.call('HSET', said, 'number', ARGV[2], 'minute', minute, unpack(fields))
  end
  redis.call('ZADD', '$REPORTING', int(now_ms), worker)
  if new_minute then
    redis.call('PEXPIRE', said, SAID_MS)
    trim('$REPORTING', int(now_ms - SAID_MS))
    redis.call('PEXPIRE', '$REPORTING', SAID_MS)
  end
end

-- How much has ever come into each queue: the first report of a minute notes it, and differences are rates.
local flow = '$FLOW_PREFIX' .. minute
if new_minute and redis.call('HEXISTS', flow, 'at') == 0 then
  local noted, streams, handovers = {'at', int(now_ms)}, cmsgpack.unpack(ARGV[7]), {}
  for position, stream in ipairs(streams) do handovers[position] = stream .. '$HANDOVER' end
  -- In most installations some queues were never used, or all; and hand-overs are for locks.
  local used, handed_over = redis.call('EXISTS', unpack(streams)), redis.call('EXISTS', unpack(handovers))
  for position, stream in ipairs(streams) do
    local added, length = 0, 0
    if used == #streams or used > 0 and redis.call('EXISTS', stream) == 1 then
      local info = redis.call('XINFO', 'STREAM', stream)
      for field = 1, #info, 2 do
        if info[field] == 'entries-added' then added = info[field + 1] end
        if info[field] == 'length' then length = info[field + 1] end
      end
    end
    if handed_over > 0 then length = length + redis.call('XLEN', handovers[position]) end
    for _, value in ipairs({stream .. ' added', added, stream .. ' length', length}) do noted[#noted + 1] = value end
  end
  redis.call('HSET', flow, unpack(noted))
  redis.call('PEXPIRE', flow, MINUTES_MS)
end

local function add_up(bucket, lives_ms, stats)
  for name, counters in pairs(stats) do
    local stored = redis.call('HGET', bucket, name)
    local sums = stored and cmsgpack.unpack(stored) or {}
    for counter, number in pairs(counters) do sums[counter] = (sums[counter] or 0) + number end
    if redis.call('HSET', bucket, name, cmsgpack.pack(sums)) == 1 then redis.call('PEXPIRE', bucket, lives_ms) end
  end
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
    trim('$LOCKS_SEEN', int(now_ms - LOCKS_MS))
    redis.call('ZREMRANGEBYRANK', '$LOCKS_SEEN', 0, -LOCKS - 1)
    redis.call('PEXPIRE', '$LOCKS_SEEN', LOCKS_MS)
  end
end
return {int(now_ms), known}
