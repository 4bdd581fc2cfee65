-- For each delivery: take all the locks of its task, or park it until they can be had.
-- KEYS: none. ARGV: consumer, deliveries (msgpack list of
--   {stream, entry, deliveries, task, rank, resumed, since, locks, retry_ms, granted}), the consumer's lease (ms) or 0;
--   `granted`: the lock for which it was granted the turn, if it was.
-- Returns a list, one for each delivery: {1} granted; {0, position of the refusing lock, when its line is looked at if
-- nothing is given back before (ms)} parked;
-- {-1} no longer ours. At its end the fencing token of the first delivery, or 0; each of the others has the next one.
-- Refusal and parking are one step: a lock that is given back in between cannot be missed.
-- #flags allow-oom
-- #include _time _alive _pending _parts _lines _locks _queue _looks _wake _cancel _redelivery _fencing
local PARKED_MS = 86400000 -- the line brings a task back; should that be lost, its own timer does
local KEPT_SLOT = 'kept:'
local MAX_PRIORITY_SPAN = 2251799813685248 -- 2^51 µs: later than any time, small enough to stay exact

-- The place in line is that of the submission (µs), not of the first question.
local function queued_at(entry)
  local ms, sequence = string.match(entry, '^(%d+)-(%d+)$')
  return int(tonumber(ms) * 1000 + math.min(tonumber(sequence), 999))
end

-- Out of its stream, into the line of the lock that refuses it. Returns when the timer looks at that.
local function park(d, since, place, lock, before)
  local there = redis.call('XRANGE', d.stream, d.entry, d.entry)[1]
  local fields = there and there[2] or {}
  local data, redelivery_count = data_of(fields) or '', count_redeliveries(d.stream, d.entry, d.deliveries, field_of(fields, 'deaths'))
  local now_ms, reason = now_us() / 1000, lock.kind == 'rate' and 'rate' or 'lock'
  remove(d.stream, d.entry)
  since = with_occurrence(since, field_of(fields, 'occurrence'))
  local name = delay(d.task, now_ms + PARKED_MS, d.resumed, reason, since, data, redelivery_count, lock.key)
  local waiting, waiter = '$WAITING_PREFIX' .. size_of(d.resumed) .. ':' .. lock.key, lock.kind .. ':' .. name
  -- No line where its key is of another type: the task asks again by itself.
  if type(redis.pcall('ZADD', waiting, int(place), waiter)) == 'table' then
    redis.call('ZADD', '$DELAYED', int(now_ms + d.retry_ms), name)
  end
  local due = now_ms + (before and TURN_MS + 1 or look_again_in(lock, math.max(d.retry_ms, quiet_ms())))
  look_at(lock.key, due, before or redis.pcall('ZRANGE', waiting, 0, 0)[1] ~= waiter)
  return int(math.ceil(due))
end

-- A task that wants several locks would be passed by for ever by tasks that want one of them each. So when it has waited
-- long, and is the next for the lock that refuses it, it keeps its turn for another for a tenth of that time. What
-- stands before it in line goes first all the same: two tasks never wait for each other. Of a concurrency limiter it keeps
-- a slot, until it asks again; others have the rest of them.
local function keeps_turn(d, lock, turns, waited_ms, place, refusing)
  local ms, size, slot = math.min(waited_ms / 10, KEPT_MS), size_of(d.resumed), lock.kind == 'concurrency'
  if ms < TURN_MS or not (slot or lock.kind == 'mutex' or lock.kind == 'exclusive') then return false end
  local turn = turns and turns[size]
  if not (lock.kept or turn and turn.reserved and turn.task == d.task) then return false end
  local next_one = heads_of(refusing, turns_of(refusing))[1]
  if not (next_one and next_one.place == place) then return false end
  local ends = int(now_us() / 1000 + ms)
  if slot then
    if room_for(lock.kind, lock) < 1 then return false end
    redis.call('ZADD', lock.key, ends, KEPT_SLOT .. d.task)
    live_at_least(lock.key, math.max(ms, SLOTS_MS))
    if turn and turn.task == d.task then redis.call('DEL', '$TURN_PREFIX' .. size .. ':' .. lock.key) end
    pcall(grant_next, lock, 'granted') -- there may be room for others
    return true
  end
  turn = table.concat({ends, '2', int(place), refusing.kind, #d.task, d.task .. refusing.key}, ' ')
  redis.call('SET', '$TURN_PREFIX' .. size .. ':' .. lock.key, turn, 'PX', int(ms))
  look_at(lock.key, now_us() / 1000 + TURN_MS + 1)
  return true
end

-- A refused task leaves its other locks, and the turns that it was granted, to the next. Somebody new who must wait may
-- have another limit than those before it: the first of them is to ask.
local function leave_to_others(d, refusing, before, waited_ms, place)
  for position, lock in ipairs(d.locks) do
    local behind, turns = position == refusing and before == 'line', lock.turns
    if position > refusing and waits_or_turns(lock) then turns = turns_of(lock) end
    if behind and d.since == '0' then
      pcall(grant_next, lock, 'asked')
    elseif (turns or lock.kept) and not behind then
      local limits = position == refusing or lock.kind == 'rate' or lock.kind == 'concurrency'
      local keeps = position ~= refusing and not before
      if limits and lock.key ~= d.granted and not lock.kept and not sizes_of_turns(turns, d.task)[1] then
        keeps = true -- it has taken nothing that others could have now
      elseif keeps then
        keeps = keeps_turn(d, lock, turns, waited_ms, place, d.locks[refusing])
      end
      if not keeps then give_up_turn(lock, d.task, 'asked', turns) end
    end
  end
end

-- It was granted the turn for a lock that it does not want any more.
local function leave_unwanted(d)
  for _, lock in ipairs(d.locks) do
    if lock.key == d.granted then return end
  end
  give_up_turn({key = d.granted}, d.task, 'unwanted')
end

local consumer, now, replies, lines, any_granted = ARGV[1], now_us(), {}, {}, false
local held = '$HELD_PREFIX' .. consumer
ensure_alive(consumer, tonumber(ARGV[3]), now)
local deliveries = cmsgpack.unpack(ARGV[2])
local places = {}
for _, d in ipairs(deliveries) do places[#places + 1], places[#places + 2] = d.stream, d.entry end
local pending = all_pending_of(consumer, places, 2)
-- What is noted and not held does no harm. What is held and not noted nobody would give back.
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
      lock.kept = lock.kind == 'concurrency' and redis.call('ZREM', lock.key, KEPT_SLOT .. d.task) == 1
    end
    local granted, refusing, _, before = take_all(d.locks, now, d.task, place)
    if granted then
      any_granted = any_granted or d.locks[1] ~= nil
      for _, lock in ipairs(refusing) do
        if lock.kind ~= 'mutex' and lock.kind ~= 'exclusive' then pcall(grant_next, lock, 'granted') end
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
