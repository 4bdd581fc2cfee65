-- Adds messages to the delayed set: all of them or none.
-- KEYS: none. ARGV: for each message task id, due time (ms since the epoch), stream, reason, message.
-- Returns 1, or the first task id that another waiting message has: then nothing is added. An identical message is a
-- repetition after a lost reply, and is accepted.
-- #include _time _lines _queue
for i = 1, #ARGV, 5 do
  local task, due, stream, reason, data = unpack(ARGV, i, i + 4)
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  if stored and (stored ~= stream .. ' ' .. reason .. ' 0\n' .. data
    or tonumber(redis.call('ZSCORE', '$DELAYED', task)) ~= tonumber(due)) then
    return task
  end
end
for i = 1, #ARGV, 5 do
  delay(ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3], '0', ARGV[i + 4])
end
return 1
