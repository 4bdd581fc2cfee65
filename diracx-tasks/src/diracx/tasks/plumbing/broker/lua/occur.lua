-- Submit one occurrence of a schedule and set its next run, once, whoever believes to lead.
-- KEYS: none. ARGV: leader's token, schedule id, due (ms), next due (ms, or '' when the rule is exhausted),
--   stream, task id, message.
-- Returns 1 submitted, 2 left out because its predecessor still waits, 0 not due any more, -1 not the leader.
-- #include _time _queue
if redis.call('GET', '$LEADER') ~= ARGV[1] then return -1 end
local due = redis.call('ZSCORE', '$NEXT_RUNS', ARGV[2])
if not due or int(tonumber(due)) ~= ARGV[3] then return 0 end
if ARGV[4] == '' then
  redis.call('ZREM', '$NEXT_RUNS', ARGV[2])
else
  redis.call('ZADD', '$NEXT_RUNS', ARGV[4], ARGV[2])
end
local last = redis.call('HGET', '$LAST_RUNS', ARGV[2])
if last then
  local stream, entry, task = string.match(last, '^(%S+) (%S+) (%S+)')
  local waits = redis.call('HEXISTS', '$DELAYED_DATA', task) == 1
  if not waits and redis.call('EXISTS', stream) == 1 and #redis.call('XRANGE', stream, entry, entry) > 0 then
    local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1)
    waits = pending.err ~= nil or #pending == 0
  end
  if waits then return 2 end
end
local entry = enqueue(ARGV[5], ARGV[7])
redis.call('HSET', '$LAST_RUNS', ARGV[2], ARGV[5] .. ' ' .. entry .. ' ' .. ARGV[6] .. ' ' .. ARGV[3])
return 1
