-- Moves due tasks from the delayed set into their streams, and the children of complete groups into theirs, without
-- decoding messages.
-- KEYS: none. ARGV: limit of tasks per call (so that the server is free for others), limit of bytes (one larger message
-- is allowed).
-- Returns {number moved, next due time (ms) or -1, now (ms), remaining lease of the leading scheduler (ms) or 0 without
-- one, 1 if there are more to move, number of unreadable tasks that are dead letters now}, all but the second 0 when
-- nothing is delayed.
-- If there are no more to move, and the next is due, it is the line of a lock, for lines.lua.
-- #flags allow-oom
-- #include _time _lines _polls _queue _published _groups
if redis.pcall('EXISTS', '$DELAYED', '$GROUP_OUTBOX', '$LINES') == 0 then return {0, '-1', '0', 0, 0, 0} end
local now, at_most, bytes_left = now_us() / 1000, tonumber(ARGV[1]), tonumber(ARGV[2])
local LONGEST_MS = 86400000 -- polled once a day at least: a score may be infinite
local function first_due(timers)
  local first = redis.call('ZRANGE', timers, 0, 0, 'WITHSCORES')[2]
  return first and math.max(0, math.min(tonumber(first), now + LONGEST_MS))
end
-- Like undelay() for each task, with few commands for all of them. Returns the number of tasks.
local function undelay_all(tasks)
  local number, plain, reasons, read, largest, stored_of = 0, {}, {}, 0, 1, {}
  for position, task in ipairs(tasks) do
    if position > #stored_of then
      if bytes_left <= 0 then break end
      -- Read the first, then more at a time: as many as the limit allows if all are as large as the largest so far.
      read = math.max(1, math.min(4 * read + 1, math.floor(bytes_left / largest)))
      local upto = math.min(position + read - 1, #tasks)
      for _, stored in ipairs(redis.call('HMGET', '$DELAYED_DATA', unpack(tasks, position, upto))) do
        stored_of[#stored_of + 1] = stored
        largest, bytes_left = math.max(largest, #(stored or '')), bytes_left - #(stored or '')
      end
    end
    local stored = stored_of[position]
    number = position
    local stream, reason, since, redelivery_count, data, lock = parts_of(stored or '')
    if not stored then
      published_delayed(task)
      bytes_left = bytes_left - #task
    elseif stream and not lock then
      plain[#plain + 1] = task
      reasons[reason] = (reasons[reason] or 0) + 1
      if not pcall(enqueue, stream, data, since, redelivery_count) then to_dead_letters(task, stored) end
    else
      undelay(task, nil, stored)
    end
  end
  if plain[1] then
    redis.call('ZREM', '$DELAYED', unpack(plain))
    redis.call('HDEL', '$DELAYED_DATA', unpack(plain))
  end
  for reason, change in pairs(reasons) do count_reason(reason, -change) end
  return number
end
local next_due, moved = first_due('$DELAYED'), 0
if next_due and next_due <= now then
  local due = redis.call('ZRANGEBYSCORE', '$DELAYED', '-inf', string.format('%.3f', now), 'LIMIT', 0, at_most)
  moved = undelay_all(due)
  next_due = first_due('$DELAYED')
end
local released
released, bytes_left = release_staged(at_most - moved, bytes_left)
moved = moved + released
local readable, line_due = pcall(first_due, '$LINES')
if readable and line_due then
  local last = tonumber(redis.call('ZRANGE', '$LINES', -1, -1, 'WITHSCORES')[2])
  if last > now + LATEST_MS and last > latest_poll(now) then line_due = 0 end
end
if readable and line_due and (not next_due or line_due < next_due) then next_due = line_due end
local next_due_ms = next_due and int(math.ceil(next_due)) or '-1'
local more = (moved == at_most or bytes_left <= 0) and 1 or 0
return {moved, next_due_ms, int(math.floor(now)), math.max(0, redis.call('PTTL', '$LEADER')), more, unreadable}
