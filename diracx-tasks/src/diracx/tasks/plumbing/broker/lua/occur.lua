-- Submits occurrences of schedules and sets their next runs; each occurrence once, also with two would-be leaders.
-- KEYS: none. ARGV: leader's token, occurrences (msgpack list of {id, due (ms)} with
--   next = the following due time (ms); without it, this is the last run
--   stream, task, data; without them, the occurrence is skipped).
-- Returns {-1} when another scheduler leads, else for each occurrence 1 submitted, 2 left out because its predecessor
-- still waits, 3 not due yet, 4 paused, 5 skipped, 6 refused by its stream, 0 not due any more.
-- After 3, 4 and 6, the next run does not change.
-- #include _time _lines _queue _schedules
if redis.call('GET', '$LEADER') ~= ARGV[1] then return {-1} end
local now, occurrences = now_us(), cmsgpack.unpack(ARGV[2])
if #occurrences == 0 then return {} end
local ids, replies, next_runs, last_runs, over = {}, {}, {}, {}, {}
for position, occurrence in ipairs(occurrences) do ids[position] = occurrence.id end
local dues = redis.call('ZMSCORE', '$NEXT_RUNS', unpack(ids))
local paused = redis.call('HMGET', '$PAUSED', unpack(ids))
local lasts = redis.call('HMGET', '$LAST_RUNS', unpack(ids))

local function decide(o, position)
  if not dues[position] or tonumber(dues[position]) ~= o.due then return 0 end
  if o.due * 1000 > now then return 3 end
  if paused[position] then return 4 end
  if not o.data then return 5 end
  if state_of(lasts[position]) == 'waits' then return 2 end
  local added, entry = pcall(enqueue, o.stream, o.data, with_occurrence('0', in_hex(o.id .. ' ' .. o.task)))
  if not added then return 6 end
  last_runs[#last_runs + 1] = o.id
  last_runs[#last_runs + 1] = last_run(o.stream, entry, o.task, o.due)
  return 1
end

for position, o in ipairs(occurrences) do
  local reply = decide(o, position)
  replies[position] = reply
  if reply == 1 or reply == 2 or reply == 5 then
    if o.next then
      next_runs[#next_runs + 1] = int(o.next)
      next_runs[#next_runs + 1] = o.id
    else
      over[#over + 1] = o.id
    end
  end
end
if #next_runs > 0 then redis.call('ZADD', '$NEXT_RUNS', unpack(next_runs)) end
if #over > 0 then redis.call('ZREM', '$NEXT_RUNS', unpack(over)) end
if #last_runs > 0 then redis.call('HSET', '$LAST_RUNS', unpack(last_runs)) end
return replies
