-- Submits a schedule's task at once, unless its last occurrence still waits. Its next run does not change; no scheduler
-- has to lead.
-- KEYS: none. ARGV: schedule, stream, task id, message.
-- Returns '', or the id of the task that still waits.
-- #include _time _lines _queue _schedules
local last = redis.call('HGET', '$LAST_RUNS', ARGV[1])
if state_of(last) == 'waits' then return string.match(last, '^%S+ %S+ (%S+)') end
local entry = enqueue(ARGV[2], ARGV[4], with_occurrence('0', in_hex(ARGV[1] .. ' ' .. ARGV[3])))
redis.call('HSET', '$LAST_RUNS', ARGV[1], last_run(ARGV[2], entry, ARGV[3], now_us() / 1000))
return ''
