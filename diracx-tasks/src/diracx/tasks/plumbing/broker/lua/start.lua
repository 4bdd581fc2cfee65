-- For each delivery: takes all the locks of its task, or parks the task until they are granted.
-- KEYS: none. ARGV: consumer, deliveries (msgpack list of
--   {stream, entry, deliveries, task, rank, resumed, since, locks, retry_ms, granted}), the consumer's lease (ms) or 0;
--   `granted`: the lock that the task was granted, if any.
-- Returns a list, one for each delivery: {1} granted; {0, position of the refusing lock, time of the next poll of its
-- line (ms)} parked; {-1} reclaimed by another worker. The last item is the fencing token of the first delivery, or 0;
-- each following delivery has the next token.
-- Refusal and parking are one step, so that a release in between cannot be missed.
-- #flags allow-oom
-- #include _time _alive _pending _parts _lines _kinds _locks _queue _polls _wake _cancel _redelivery _fencing
local PARKED_MS = 86400000 -- due time of a parked task, in case that its line is lost
local MAX_PRIORITY_SPAN = 2251799813685248 -- 2^51 µs: later than any time, small enough to stay exact

-- Time of the submission (µs), which determines the place in line.
local function queued_at(entry)
  local ms, sequence = string.match(entry, '^(%d+)-(%d+)$')
  return int(tonumber(ms) * 1000 + math.min(tonumber(sequence), 999))
end

-- Moves a task from its stream into the line of the refusing lock. Returns the time of the next poll of the line (ms).
local function park(d, since, place, lock, before)
  local found = redis.call('XRANGE', d.stream, d.entry, d.entry)[1]
  local fields = found and found[2] or {}
  local data, redelivery_count = data_of(fields) or '', count_redeliveries(d.stream, d.entry, d.deliveries, field_of(fields, 'deaths'))
  local now_ms, reason = now_us() / 1000, kind_of(lock.kind).quota and 'rate' or 'lock'
  remove(d.stream, d.entry)
  since = with_occurrence(since, field_of(fields, 'occurrence'))
  local name = delay(d.task, now_ms + PARKED_MS, d.resumed, reason, since, data, redelivery_count, lock.key)
  local waiting, waiter = '$WAITING_PREFIX' .. size_of(d.resumed) .. ':' .. lock.key, lock.kind .. ':' .. name
  -- Without a line, as its key has the wrong type, the task tries again when it is due.
  if type(redis.pcall('ZADD', waiting, int(place), waiter)) == 'table' then
    redis.call('ZADD', '$DELAYED', int(now_ms + d.retry_ms), name)
  end
  local due = now_ms + (before and RESERVATION_MS + 1 or poll_delay(lock, math.max(d.retry_ms, quiet_ms())))
  schedule_poll(lock.key, due, before or redis.pcall('ZRANGE', waiting, 0, 0)[1] ~= waiter)
  return int(math.ceil(due))
end

-- Keeps a refused task's grant of another of its locks; returns true if it does. A task that needs several locks would
-- otherwise be overtaken forever by tasks that need one of them each. So a task that has waited long, and is the next
-- for the refusing lock, keeps its grant for a tenth of that time. Tasks before it in line still go first: two tasks
-- never wait for each other. Of a concurrency limiter it keeps one slot until its next attempt.
local function keeps_grant(d, lock, grants, waited_ms, place, refusing)
  local ms, size, kind = math.min(waited_ms / 10, KEPT_MS), size_of(d.resumed), kind_of(lock.kind)
  if ms < RESERVATION_MS or not (kind.reserve or kind.alone) then return false end
  local grant = grants and grants[size]
  if not (lock.kept or grant and grant.valid_until and grant.task == d.task) then return false end
  local next_one = heads_of(refusing, grants_of(refusing))[1]
  if not (next_one and next_one.place == place) then return false end
  if kind.reserve then
    if kind.room(lock) < 1 then return false end
    kind.reserve(lock, d.task, ms)
    if grant and grant.task == d.task then redis.call('DEL', '$RESERVATION_PREFIX' .. size .. ':' .. lock.key) end
    pcall(grant_next, lock, 'granted') -- there may be room for others
    return true
  end
  grant = table.concat({int(now_us() / 1000 + ms), '2', int(place), refusing.kind, #d.task, d.task .. refusing.key}, ' ')
  redis.call('SET', '$RESERVATION_PREFIX' .. size .. ':' .. lock.key, grant, 'PX', int(ms))
  schedule_poll(lock.key, now_us() / 1000 + RESERVATION_MS + 1)
  return true
end

-- Grants the other locks of a refused task to the next tasks. A new task may have a higher limit than those that wait:
-- then the first of them is granted the lock, to try again.
local function leave_to_others(d, refusing, before, waited_ms, place)
  for position, lock in ipairs(d.locks) do
    local behind, grants = position == refusing and before == 'line', lock.grants
    if position > refusing and is_awaited(lock) then grants = grants_of(lock) end
    if behind and d.since == '0' then
      pcall(grant_next, lock, 'waiting')
    elseif (grants or lock.kept) and not behind then
      local limits = position == refusing or kind_of(lock.kind).limiter
      local keeps = position ~= refusing and not before
      if limits and lock.key ~= d.granted and not lock.kept and not sizes_granted(grants, d.task)[1] then
        keeps = true -- it has taken nothing that another task could take now
      elseif keeps then
        keeps = keeps_grant(d, lock, grants, waited_ms, place, d.locks[refusing])
      end
      if not keeps then give_up_grant(lock, d.task, 'waiting', grants) end
    end
  end
end

-- Gives up the grant of a lock that the task no longer needs.
local function leave_unwanted(d)
  for _, lock in ipairs(d.locks) do
    if lock.key == d.granted then return end
  end
  give_up_grant({key = d.granted}, d.task, 'unwanted')
end

local consumer, now, replies, lines, any_granted = ARGV[1], now_us(), {}, {}, false
local held = '$HELD_PREFIX' .. consumer
ensure_alive(consumer, tonumber(ARGV[3]), now)
local deliveries = cmsgpack.unpack(ARGV[2])
local places = {}
for _, d in ipairs(deliveries) do places[#places + 1], places[#places + 2] = d.stream, d.entry end
local pending = all_pending_of(consumer, places, 2)
-- Record the locks first: a recorded lock that is not held is harmless, but an unrecorded one would never be released.
for _, d in ipairs(deliveries) do
  for _, lock in ipairs(pending[d.stream][d.entry] == d.deliveries and d.locks or {}) do
    lines[#lines + 1], lines[#lines + 2] = held_line(lock)
  end
end
in_parts(lines, function(...) redis.call('HSET', held, ...) end)
for position, d in ipairs(deliveries) do
  if pending[d.stream][d.entry] ~= d.deliveries then
    replies[position] = {-1}
  else
    local since = d.since
    if since == '0' then since = queued_at(d.entry) end
    local place = d.rank * MAX_PRIORITY_SPAN + tonumber(since)
    for _, lock in ipairs(since == d.since and d.locks or {}) do
      local unreserve = kind_of(lock.kind).unreserve
      lock.kept = unreserve and unreserve(lock, d.task)
    end
    local granted, refusing, _, before = take_all(d.locks, now, d.task, place)
    if granted then
      any_granted = any_granted or d.locks[1] ~= nil
      for _, lock in ipairs(refusing) do
        if not kind_of(lock.kind).alone then pcall(grant_next, lock, 'granted') end
      end
      replies[position] = {1}
    else
      local due = park(d, since, place, d.locks[refusing], before)
      leave_to_others(d, refusing, before, (now - tonumber(since)) / 1000, place)
      local returned = {}
      for _, each in ipairs(d.locks) do returned[#returned + 1] = held_line(each) end
      in_parts(returned, function(...) redis.call('HDEL', held, ...) end)
      replies[position] = {0, refusing, due}
    end
    if d.granted then leave_unwanted(d) end
  end
end
replies[#deliveries + 1] = any_granted and take_tokens(#deliveries, now) or 0
return replies
