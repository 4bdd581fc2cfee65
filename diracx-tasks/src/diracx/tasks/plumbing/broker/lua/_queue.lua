-- A message is in a stream or in the delayed set. Only these functions move it between them.

-- In the delayed set, an occurrence of a schedule has `{since}@{schedule and task, in hexadecimal}` for `since`, and in
-- a stream the field `occurrence`: each move updates `$LAST_RUNS`, so that its schedule knows its position.
local function in_hex(text)
  return (string.gsub(text, '.', function(byte) return string.format('%02x', string.byte(byte)) end))
end

local function with_occurrence(since, occurrence)
  return occurrence and since .. '@' .. occurrence or since
end

local function from_hex(text)
  return (string.gsub(text, '%x%x', function(byte) return string.char(tonumber(byte, 16)) end))
end

-- Updates the entry of the last occurrence of a schedule.
local function note_moved(occurrence, stream, entry)
  local schedule, task = string.match(from_hex(occurrence), '^(.*) (%S+)$')
  local last = schedule and redis.pcall('HGET', '$LAST_RUNS', schedule)
  local known, due = string.match(type(last) == 'string' and last or '', '^%S+ %S+ (%S+) (%d+)$')
  if known == task then redis.pcall('HSET', '$LAST_RUNS', schedule, table.concat({stream, entry, task, due}, ' ')) end
end

-- Adds a message to a stream; returns the entry.
-- `redelivery_count`: number of workers lost with earlier entries, as each entry has a delivery count of its own.
-- `granted`: key of the lock that was granted to the task, or nil. `started`: a worker may have started the task.
local function enqueue(stream, data, since, redelivery_count, granted, started)
  local fields, occurrence = {'data', data}, nil
  if since and since ~= '0' then
    since, occurrence = string.match(since, '^(%d+)@?(%x*)$')
    if since ~= '0' then fields[3], fields[4] = 'since', since end
    if occurrence ~= '' then fields[#fields + 1], fields[#fields + 2] = 'occurrence', occurrence end
  end
  if redelivery_count and tonumber(redelivery_count) > 0 then
    fields[#fields + 1], fields[#fields + 2] = 'deaths', redelivery_count
  end
  if granted then fields[#fields + 1], fields[#fields + 2] = 'woken', granted end
  if started then fields[#fields + 1], fields[#fields + 2] = 'started', 1 end
  local entry = redis.call('XADD', stream, '*', unpack(fields))
  if occurrence and occurrence ~= '' then note_moved(occurrence, stream, entry) end
  return entry
end

local PRIORITIES = {realtime = true, normal = true, background = true}
local SIZES = {small = true, medium = true, large = true}

-- True if it is the name of a stream of tasks: data from outside could name any key.
local function is_stream(name)
  local priority, size, rest = string.match(name or '', '^diracx:tasks:(%l+):(%l+)(.*)$')
  return PRIORITIES[priority] and SIZES[size] and (rest == '' or rest == '$RESUMED_SUFFIX')
end

-- The first line, and the rest after it; '' without an end of line.
local function head_of(stored)
  local header_end = string.find(stored, '\n', 1, true)
  if not header_end then return '' end
  return string.sub(stored, 1, header_end - 1), string.sub(stored, header_end + 1)
end

-- Stores an unreadable message as a dead letter, with all its bytes. An audit, which starts soon, finds the group that
-- waits for it.
local unreadable = 0
local function to_dead_letters(task, stored)
  unreadable = unreadable + 1
  redis.call('XADD', '$DEAD_LETTERS', '*', 'reason', 'unparsable', 'task', task, 'data', stored)
  redis.pcall('DEL', '$GROUPS_AUDITED')
end

-- Counts the tasks in the delayed set by reason, for statistics.
local function count_reason(reason, change)
  if redis.call('HINCRBY', '$DELAYED_REASONS', reason, change) <= 0 then
    redis.call('HDEL', '$DELAYED_REASONS', reason)
  end
end

-- Parses a stored delayed task: stream, reason, since, redelivery_count, message, and the key of the lock that it waits
-- for or nil; nothing if it is unreadable.
local function parts_of(stored)
  local header, data = head_of(stored)
  local stream, reason, since, redelivery_count, lock = string.match(header, '^(%S+) ([%l_]+) (%d+@?%x*) ?(%d*) ?(.*)$')
  if not is_stream(stream) then return end
  if string.byte(lock) == 0 then lock = from_hex(string.sub(lock, 2)) end
  return stream, reason, since, tonumber(redelivery_count), data, lock ~= '' and lock or nil
end

-- Encodes the key of a lock for the header line; no key begins with NUL.
local function as_noted(lock)
  return string.find(lock, '\n', 1, true) and '\0' .. in_hex(lock) or lock
end

-- Removes a delayed task, also from the line of its lock. Returns the stored value and its parts, nil when there is
-- none; the last is the key of the lock, if other tasks wait for it.
local function take_delayed(task, stored)
  stored = stored or redis.call('HGET', '$DELAYED_DATA', task)
  redis.call('ZREM', '$DELAYED', task)
  if not stored then return nil end
  redis.call('HDEL', '$DELAYED_DATA', task)
  local stream, reason, since, redelivery_count, data, lock = parts_of(stored)
  if stream then count_reason(reason, -1) end
  if lock then
    local waiters = {}
    for position, kind in ipairs({$LOCK_KINDS}) do
      waiters[position] = kind .. ':' .. task
    end
    redis.pcall('ZREM', '$WAITING_PREFIX' .. size_of(stream) .. ':' .. lock, unpack(waiters))
    if redis.call('EXISTS', of_all_sizes('$WAITING_PREFIX', lock)) == 0 then
      redis.pcall('ZREM', '$LINES', lock)
      lock = nil
    end
  end
  return stored, stream, since, redelivery_count, data, lock
end

-- Announces a new earliest due time. Without the right to publish, the next poll finds it. If no scheduler listens, the
-- workers are notified.
local polling = false
local function announce_due(due_ms)
  if not polling and redis.pcall('PUBLISH', '$WAKE_SCHEDULER', 'delayed') == 0 then
    redis.pcall('PUBLISH', '$WAKE_WORKERS', int(math.max(0, math.ceil(due_ms - now_us() / 1000))))
  end
end

-- Sets the time of the next poll of a line; `at_first`: only if it has none yet.
local function schedule_poll(lock, due_ms, at_first)
  local before = tonumber(redis.pcall('ZSCORE', '$LINES', lock) or nil)
  if before and at_first then return end
  redis.pcall('ZADD', '$LINES', string.format('%.3f', due_ms), lock)
  if (not before or due_ms < before) and redis.pcall('ZRANGE', '$LINES', 0, 0)[1] == lock then announce_due(due_ms) end
end

-- Adds a task to the delayed set, without decoding its message.
-- `lock`: key of the lock that refused it, or nil.
-- Replaces the same message; another message with the same id is stored under another name.
-- Returns the name under which the task is stored.
local function delay(task, due_ms, stream, reason, since, data, redelivery_count, lock)
  local header = stream .. ' ' .. reason .. ' ' .. since
  if lock or (redelivery_count and redelivery_count > 0) then header = header .. ' ' .. (redelivery_count or 0) end
  if lock then header = header .. ' ' .. as_noted(lock) end
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  if stored and select(2, head_of(stored)) ~= data then
    task = task .. ' ' .. redis.sha1hex(data)
    stored = true
  end
  if stored then take_delayed(task) end
  if redis.call('EXISTS', '$DELAYED_DATA') == 0 then redis.call('DEL', '$DELAYED_REASONS') end
  count_reason(reason, 1)
  redis.call('HSET', '$DELAYED_DATA', task, header .. '\n' .. data)
  redis.call('ZADD', '$DELAYED', string.format('%.3f', due_ms), task)
  if not lock and redis.call('ZRANGE', '$DELAYED', 0, 0)[1] == task then announce_due(due_ms) end
  return task
end

-- Moves a task from the delayed set into its stream; `granted` is the key of the lock that was granted to it, or nil.
-- Returns the entry. False when the task does not exist, or is a dead letter now: it is unreadable, or its stream
-- refuses it (a key of the wrong type, or the last possible id is used).
local function undelay(task, granted, stored)
  local stream, since, redelivery_count, data
  stored, stream, since, redelivery_count, data = take_delayed(task, stored)
  if not stored then return false end
  if stream then
    local added, entry = pcall(enqueue, stream, data, since, redelivery_count, granted)
    if added then return entry end
  end
  to_dead_letters(task, stored)
  return false
end
