-- Reads the numbers of the whole system, in one atomic step. Its time does not depend on the lengths of the queues.
-- KEYS: none. ARGV: the streams of the nine queues (msgpack list).
-- Returns a msgpack map:
--   now      (ms)
--   queues   = for each stream {length, number reserved for workers, time since which the first of the others waits
--   (µs,
--              or 0), entries ever added}, all but the last with the resumed queue
--   flow     = {since (ms), {stream ` added` = …, stream ` ended` = …}}: numbers of added tasks up to five minutes ago,
--              and of ended ones since then; absent without reports
--   delayed  = {reason, number, …};  overdue = delayed tasks that are more than 10 s late
--   schedules, late (of the first 1,000 that are due and not paused), leads (1: a scheduler leads), groups, dead;
--   schedule_lateness, delayed_lateness: the greatest lateness (ms);
--   groups_stuck: groups without an ended child or retry for a day, or failed;  dead_since: time of the first
--   dead letter (ms), absent without one.
-- #flags no-writes
-- #include _time
local MINUTES, LATE_MS, SCHEDULES = 5, 10000, 1000
local now_ms = math.floor(now_us() / 1000)
local found = {now = now_ms, queues = {}}

-- Time since which the entry waits that the next fetch will get (µs).
local function first_waiting(stream, after)
  local entries = redis.pcall('XRANGE', stream, after == '0-0' and '-' or '(' .. after, '+', 'COUNT', 1)
  local entry = not entries.err and entries[1] -- an error after the greatest possible id
  if not entry then return nil end
  for field = 1, #entry[2], 2 do
    if entry[2][field] == 'since' then return tonumber(string.match(entry[2][field + 1], '^%d+$')) end
  end
  return tonumber(string.match(entry[1], '^%d+')) * 1000
end

for position, name in ipairs(cmsgpack.unpack(ARGV[1])) do
  local length, taken, oldest, added = 0, 0, nil, 0
  for _, stream in ipairs({name, name .. '$RESUMED_SUFFIX'}) do
    local here = redis.call('XLEN', stream)
    if redis.call('EXISTS', stream) == 1 then
      local last, pending = '0-0', 0
      for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
        local of = {}
        for field = 1, #group, 2 do of[group[field]] = group[field + 1] end
        if of.name == '$GROUP' then last, pending = of['last-delivered-id'], of.pending end
      end
      if here > pending then
        local since = first_waiting(stream, last)
        if since and (not oldest or since < oldest) then oldest = since end
      end
      taken = taken + pending
      if stream == name then
        local info = redis.call('XINFO', 'STREAM', stream)
        for field = 1, #info, 2 do
          if info[field] == 'entries-added' then added = info[field + 1] end
        end
      end
    end
    length = length + here
  end
  found.queues[position] = {length, taken, oldest or 0, added}
end

local minute = math.floor(now_ms / 60000)
for before = MINUTES, 1, -1 do
  local noted = redis.call('HGETALL', '$THROUGHPUT_PREFIX' .. int(minute - before))
  local values = {}
  for field = 1, #noted, 2 do values[noted[field]] = tonumber(noted[field + 1]) end
  if found.flow then
    for name, value in pairs(values) do
      if string.sub(name, -6) == ' ended' then found.flow[2][name] = (found.flow[2][name] or 0) + value end
    end
  elseif values.at then
    found.flow = {values.at, values}
  end
end
if found.flow then
  local noted = redis.call('HGETALL', '$THROUGHPUT_PREFIX' .. int(minute))
  for field = 1, #noted, 2 do
    if string.sub(noted[field], -6) == ' ended' then
      found.flow[2][noted[field]] = (found.flow[2][noted[field]] or 0) + tonumber(noted[field + 1])
    end
  end
end
found.delayed = redis.call('EXISTS', '$DELAYED') == 1 and redis.call('HGETALL', '$DELAYED_REASONS') or {}
found.overdue = redis.call('ZCOUNT', '$DELAYED', '-inf', int(now_ms - LATE_MS))
found.schedules = redis.call('ZCARD', '$NEXT_RUNS')
found.late, found.schedule_lateness, found.delayed_lateness = 0, 0, 0
local due = redis.call('ZRANGEBYSCORE', '$NEXT_RUNS', '-inf', int(now_ms), 'WITHSCORES', 'LIMIT', 0, SCHEDULES)
for at = 1, #due, 2 do
  if redis.call('HEXISTS', '$PAUSED', due[at]) == 0 then
    local late_ms = math.min(now_ms, now_ms - tonumber(due[at + 1])) -- of any score
    found.schedule_lateness = math.max(found.schedule_lateness, late_ms)
    if late_ms > LATE_MS then found.late = found.late + 1 end
  end
end
local first = redis.call('ZRANGE', '$DELAYED', 0, 0, 'WITHSCORES')[2]
if first then found.delayed_lateness = math.floor(math.min(now_ms, math.max(0, now_ms - tonumber(first)))) end
found.leads = redis.call('EXISTS', '$LEADER')
found.groups = redis.call('ZCARD', '$GROUPS')
-- An ended child or a retry extends a group's time to live to 7 days; during its submission it has 10 minutes: see
-- _groups.lua and group.lua.
found.groups_stuck = redis.call('ZCOUNT', '$GROUPS', int(now_ms + 600000), int(now_ms + 518400000))
found.dead = redis.call('XLEN', '$DEAD_LETTERS')
local dead_letter = redis.call('XRANGE', '$DEAD_LETTERS', '-', '+', 'COUNT', 1)[1]
if dead_letter then found.dead_since = tonumber(string.match(dead_letter[1], '^%d+')) end
return cmsgpack.pack(found)
