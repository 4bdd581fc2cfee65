-- Publishes the report of a worker: its state, its running tasks, and the statistics since the last report.
-- KEYS: none. ARGV: worker, number of the report, state or '' (unchanged), running tasks or '' (unchanged),
--   statistics (msgpack) or '', 1 when the worker stops, the nine queues (msgpack), and the age (ms) of the first
--   counters in $SUMS from which all of them are added up ('': do not add them up). Statistics may have
--   stats    = {name of a task = {counter = number}}   into the buckets of this minute and this hour
--   ended    = {stream = number of executions}         for the rate at which a queue is worked off
--   failures = list of msgpack strings                 into the stream of failures
--   locks    = list of lines, `{kind} {limit} {window in µs} {key}`, of limiters and of locks that refused.
-- $SUMS has msgpack lists: worker, number, and statistics with `stats` and `ended`; numbers are times of the server's
-- clock (ms).
-- Returns {now (ms), 1 if the last report of the worker is stored, 1 if there are more counters than one call adds up}.
-- A repeated report, or repeated counters, add nothing.
-- #flags allow-oom
-- #include _time
local REPORT_MS, RENEW_MINUTES, MINUTES_MS, HOURS_MS, THROUGHPUT_MINUTES = 3600000, 10, 4200000, 90000000, 3
local FAILURES, FAILURES_MS, LOCKS, LOCKS_MS, SUMS_AT_ONCE = 500, 604800000, 1000, 86400000, 200
local worker, now_ms = ARGV[1], math.floor(now_us() / 1000)
local report = '$REPORT_PREFIX' .. worker
local minute, hour = int(math.floor(now_ms / 60000)), int(math.floor(now_ms / 3600000))
local before = redis.call('HMGET', report, 'number', 'minute')
local known, repeated, new_minute = before[1] and 1 or 0, before[1] == ARGV[2], before[2] ~= minute
local renewed = (tonumber(before[2]) or 0) + RENEW_MINUTES <= tonumber(minute)

if ARGV[6] == '1' then
  redis.call('DEL', report)
  redis.call('ZREM', '$REPORTING', worker)
else
  local fields = {}
  if ARGV[3] ~= '' then fields[#fields + 1] = 'line'; fields[#fields + 1] = ARGV[3] end
  if ARGV[4] ~= '' then fields[#fields + 1] = 'running'; fields[#fields + 1] = ARGV[4] end
  local news = fields[1] or ARGV[5] ~= ''
  if news or renewed then redis.call('HSET', report, 'number', ARGV[2], 'minute', minute, unpack(fields)) end
  redis.call('ZADD', '$REPORTING', int(now_ms), worker)
  if news and new_minute or renewed then -- before it expires, but not with each report of an idle worker
    redis.call('PEXPIRE', report, REPORT_MS)
    trim('$REPORTING', int(now_ms - REPORT_MS))
    redis.call('PEXPIRE', '$REPORTING', REPORT_MS)
  end
end

-- Stores the number of tasks ever added to each queue, with the first report of a minute; differences are rates. If no
-- task ends, every third minute is enough.
local flow = '$THROUGHPUT_PREFIX' .. minute
local due = known == 0 or ARGV[5] ~= '' or tonumber(minute) % THROUGHPUT_MINUTES == 0
if new_minute and due and redis.call('HEXISTS', flow, 'at') == 0 then
  local noted, streams, resumed_streams = {'at', int(now_ms)}, cmsgpack.unpack(ARGV[7]), {}
  for position, stream in ipairs(streams) do resumed_streams[position] = stream .. '$RESUMED_SUFFIX' end
  -- Often the queues of some sizes were never used: a worker creates all those of its size.
  local SIZES, used, resumed_pending = 3, {}, {}
  for size = 1, SIZES do
    local queues, resumed = {}, {}
    for position = size, #streams, SIZES do
      queues[#queues + 1], resumed[#resumed + 1] = streams[position], resumed_streams[position]
    end
    used[size % SIZES], resumed_pending[size % SIZES] = redis.call('EXISTS', unpack(queues)), 0
    if used[size % SIZES] > 0 then resumed_pending[size % SIZES] = redis.call('EXISTS', unpack(resumed)) end
  end
  for position, stream in ipairs(streams) do
    local added, length, of_size = 0, 0, used[position % SIZES]
    if of_size == #streams / SIZES or of_size > 0 and redis.call('EXISTS', stream) == 1 then
      local info = redis.call('XINFO', 'STREAM', stream)
      for field = 1, #info, 2 do
        if info[field] == 'entries-added' then added = info[field + 1] end
        if info[field] == 'length' then length = info[field + 1] end
      end
    end
    if resumed_pending[position % SIZES] > 0 then length = length + redis.call('XLEN', resumed_streams[position]) end
    for _, value in ipairs({stream .. ' added', added, stream .. ' length', length}) do noted[#noted + 1] = value end
  end
  redis.call('HSET', flow, unpack(noted))
  redis.call('PEXPIRE', flow, MINUTES_MS)
end

local stats, ended = {}, {}
local function add(added)
  for name, counters in pairs(added.stats or {}) do
    local sums = stats[name] or {}
    stats[name] = sums
    for counter, number in pairs(counters) do sums[counter] = (sums[counter] or 0) + number end
  end
  for stream, number in pairs(added.ended or {}) do ended[stream] = (ended[stream] or 0) + number end
end

local function add_up(bucket, lives_ms)
  for name, counters in pairs(stats) do
    local stored = redis.call('HGET', bucket, name)
    local sums = stored and cmsgpack.unpack(stored) or {}
    for counter, number in pairs(counters) do sums[counter] = (sums[counter] or 0) + number end
    if redis.call('HSET', bucket, name, cmsgpack.pack(sums)) == 1 then redis.call('PEXPIRE', bucket, lives_ms) end
  end
end

-- Adds up the counters in $SUMS.
local more = 0
local function take_sums()
  local workers, numbers, all = {}, {}, {}
  for _, sums in ipairs(redis.call('LPOP', '$SUMS', SUMS_AT_ONCE) or {}) do
    local readable, one = pcall(cmsgpack.unpack, sums)
    if readable and type(one) == 'table' and tonumber(one[2]) and type(one[3]) == 'table' then
      all[#all + 1], workers[#workers + 1] = one, tostring(one[1])
    end
  end
  more = redis.call('EXISTS', '$SUMS')
  if not workers[1] then return end
  for position, number in ipairs(redis.call('ZMSCORE', '$SUMS_ADDED', unpack(workers))) do
    numbers[workers[position]] = tonumber(number or 0)
  end
  local last = {}
  for _, sums in ipairs(all) do
    local sender, number = tostring(sums[1]), tonumber(sums[2])
    if number > numbers[sender] then
      add(sums[3])
      numbers[sender], last[sender] = number, number
    end
  end
  local noted = {}
  for sender, number in pairs(last) do noted[#noted + 1], noted[#noted + 2] = int(number), sender end
  if noted[1] then redis.call('ZADD', '$SUMS_ADDED', unpack(noted)) end
  trim('$SUMS_ADDED', int(now_ms - REPORT_MS))
  redis.call('PEXPIRE', '$SUMS_ADDED', REPORT_MS)
end

if ARGV[8] ~= '' then
  local first = redis.pcall('LINDEX', '$SUMS', 0)
  local readable, sums = pcall(cmsgpack.unpack, first)
  local sent_ms = readable and type(sums) == 'table' and tonumber(sums[2]) or 0
  -- An unreadable list is deleted: only counters are lost.
  if first and sent_ms + tonumber(ARGV[8]) <= now_ms and not pcall(take_sums) then redis.call('UNLINK', '$SUMS') end
end
local added = ARGV[5] ~= '' and not repeated and cmsgpack.unpack(ARGV[5]) or {}
add(added)
add_up('$MINUTE_PREFIX' .. minute, MINUTES_MS)
add_up('$HOUR_PREFIX' .. hour, HOURS_MS)
for stream, number in pairs(ended) do
  if redis.call('HINCRBY', flow, stream .. ' ended', number) == number then redis.call('PEXPIRE', flow, MINUTES_MS) end
end
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
return {int(now_ms), known, more}
