-- Cancellation marks. `$CANCELLED` is a sorted set: task -> expiry of its mark (ms). It is usually empty, so that a
-- check takes one TYPE per script and no round trip.

-- The id of a task, from the head of its message, without decoding the rest.
local function task_of(data)
  if not data or string.sub(data, 2, 9) ~= '\167task_id' then return nil end
  local kind = string.byte(data, 10)
  if not kind then return nil end
  if kind >= 160 and kind <= 191 then return string.sub(data, 11, 10 + kind - 160) end
  if kind == 217 and #data > 11 then return string.sub(data, 12, 11 + string.byte(data, 11)) end
  return nil
end

-- The value of a field of an entry, or nil.
local function field_of(fields, name)
  for field = 1, #fields, 2 do
    if fields[field] == name then return fields[field + 1] end
  end
  return nil
end

local function data_of(fields)
  return field_of(fields, 'data')
end

local function any_cancelled()
  return redis.call('TYPE', '$CANCELLED').ok == 'zset'
end

local function is_cancelled(data)
  local task = task_of(data)
  return task ~= nil and redis.call('ZSCORE', '$CANCELLED', task) ~= false
end

-- Adds a message to the reply for a worker: position of its stream, entry, its data (or all fields, if it has others),
-- deliveries, 1 if it is marked as cancelled. One flat list, as nested tables take the server more time than values.
local function add_delivery(messages, position, entry, deliveries, marks)
  local fields, last = entry[2], #messages
  messages[last + 1] = position
  messages[last + 2] = entry[1]
  messages[last + 3] = #fields == 2 and fields[1] == 'data' and fields[2] or fields
  messages[last + 4] = deliveries
  messages[last + 5] = marks and is_cancelled(data_of(fields)) and 1 or 0
end
