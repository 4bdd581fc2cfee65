-- Move what is due from the delayed set into its streams, and the children of complete groups into theirs.
-- Messages are not decoded.
-- KEYS: none. ARGV: the most to move in one step (keeps the server free for others), the most bytes (but for what is
-- larger alone).
-- Returns {number moved, when the next is due in ms or -1, now in ms, how long the leading scheduler leads if it does
-- not renew (ms), 0 when none does, 1 when there is more to move, how many are dead letters now for nobody can read
-- them}, all but the second 0 when there is nothing at all.
-- If there is no more to move, and the next is due, it is the line of a lock, for lines.lua.
-- #flags allow-oom
-- #include _time _lines _looks _queue _published _groups
if redis.pcall('EXISTS', '$DELAYED', '$GROUP_OUTBOX', '$LINES') == 0 then return {0, '-1', '0', 0, 0, 0} end
local now, at_most, bytes_left = now_us() / 1000, tonumber(ARGV[1]), tonumber(ARGV[2])
local LONGEST_MS = 86400000 -- looked at again once a day: a score may be infinite
local function first_due(timers)
  local first = redis.call('ZRANGE', timers, 0, 0, 'WITHSCORES')[2]
  return first and math.max(0, math.min(tonumber(first), now + LONGEST_MS))
end
-- As undelay() does for each, with few commands for all of them. Returns how many they were.
local function undelay_all(tasks)
  local number, plain, reasons, read, largest, stored_of = 0, {}, {}, 0, 1, {}
  for position, task in ipairs(tasks) do
    if position > #stored_of then
      if bytes_left <= 0 then break end
      -- The first, then more of them at a time, as many as may be read if all are as large as the largest so far.
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
  if last > now + LATEST_MS and last > latest_look(now) then line_due = 0 end
end
if readable and line_due and (not next_due or line_due < next_due) then next_due = line_due end
local next_due_ms = next_due and int(math.ceil(next_due)) or '-1'
local more = (moved == at_most or bytes_left <= 0) and 1 or 0
return {moved, next_due_ms, int(math.floor(now)), math.max(0, redis.call('PTTL', '$LEADER')), more, unreadable}
