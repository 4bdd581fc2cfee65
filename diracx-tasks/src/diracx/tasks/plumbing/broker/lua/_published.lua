-- Delayed tasks of the published package 0.7: see published.py.

-- Converts a member of the delayed set that is a whole message, scored with its due time in seconds, or adds it to its
-- queue if it is due. An unreadable member becomes a dead letter with all its bytes.
local function published_delayed(member)
  local due_ms = tonumber(redis.call('ZSCORE', '$DELAYED', member)) * 1000
  local read, _, _, task, _, _, name, labels = pcall(cmsgpack.unpack_limit, member, 6, 1)
  read = read and name == 'labels' and type(labels) == 'table'
  local stream = read and 'diracx:tasks:' .. tostring(labels.priority or 'normal') .. ':' .. tostring(labels.size or 'medium')
  if not read or not is_stream(stream) then
    to_dead_letters(string.sub(member, 1, 200), member)
  elseif due_ms > now_us() / 1000 then
    delay(task, due_ms, stream, labels._retry_attempt and 'retry' or 'at_time', '0', member)
  elseif not pcall(enqueue, stream, member) then
    to_dead_letters(task, member)
  end
  redis.call('ZREM', '$DELAYED', member) -- last: after an error before it, the next call repeats all
end
