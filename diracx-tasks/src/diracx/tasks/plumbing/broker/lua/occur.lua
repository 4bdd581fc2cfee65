-- Submit occurrences of schedules and set their next runs, each of them once, even if two schedulers believe to lead.
-- KEYS: none. ARGV: leader's token, occurrences (msgpack list of {id, due (ms)} with
--   next = when it is due after that (ms); without it, this is the last run
--   stream, task, data; without them, the occurrence is passed over).
-- Returns {-1} when another scheduler leads, else for each occurrence 1 submitted, 2 left out because its predecessor
-- still waits, 3 not due yet, 4 paused, 5 passed over, 6 its stream refuses it, 0 not due any more.
-- What is not due yet, paused or refused stays due.
-- #include _time _lines _queue _schedules
if redis.call('GET', '$LEADER') ~= ARGV[1] then return {-1} end
local now, wanted = now_us(), cmsgpack.unpack(ARGV[2])
if #wanted == 0 then return {} end
local ids, replies, next_runs, last_runs, over = {}, {}, {}, {}, {}
for position, occurrence in ipairs(wanted) do ids[position] = occurrence.id end
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

for position, o in ipairs(wanted) do
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
