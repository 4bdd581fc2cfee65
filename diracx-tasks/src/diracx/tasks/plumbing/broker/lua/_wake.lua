-- Lines: who waits for a lock, first come, first served within a priority. Waiters are "{kind of lock}:{task}", and have
-- no timer of their own: the line has one, in `$LINES`. Each grant of a turn is charged to what made it possible: a lock
-- that was given back, a task that was granted one and left room for others, a newcomer, or the timer. So a line in
-- which nothing moves costs nothing but the timer: all of these look at `LOOKS_PER_SECOND` lines at most.
-- Who is granted a turn asks for its locks as anybody does. A turn is reserved for a moment, and a lock that is not
-- asked for in that time is granted to the next; and as long as no worker takes the one that did not ask, to those of
-- other sizes only. Of several of one size that are granted side by side, the last has the turn.
local TURN_NOTED_MS, LOOK_MS, AHEAD, BYTES, UNWANTED = 3600000, 10000, 500, 8192, 10
local work_left = 40 -- waiters that one run of a script looks at, less for large messages; the timer does the rest

-- For how many waiters of a kind there is room. Of a limiter whose limit is unknown here the first is to ask.
local function room_for(kind, lock)
  if kind == 'shared' then return redis.call('HEXISTS', lock.key, 'writer_owner') == 0 and math.huge or 0 end
  if (kind == 'concurrency' or kind == 'rate') and not lock.limit then return 1 end
  if kind == 'concurrency' then
    return lock.limit - redis.call('ZCOUNT', lock.key, '(' .. in_ms(now_us()), '+inf')
  end
  if kind == 'rate' then
    return math.floor((lock.limit - spent(lock, now_us())) / lock.n_items)
  end
  return redis.call('EXISTS', lock.key) == 0 and 1 or 0
end

-- Grant the turn to one who waits, `head` of heads_of(), and note it in `granted`. Returns whether it has it.
local function grant_turn(lock, head, granted)
  local task = string.match(head.waiter, '^%a+:(.*)$')
  local stored = redis.call('HGET', '$DELAYED_DATA', task or '')
  local stream, _, _, _, _, waits_for = parts_of(stored or '')
  work_left = work_left - 1 - #(stored or '') / BYTES
  if not stream or waits_for ~= lock.key or size_of(stream) ~= head.size then
    redis.call('ZREM', head.line, head.waiter) -- this waiter has left the line
    return false
  end
  local entry = undelay(task, lock.key, stored)
  if entry then granted[head.size] = table.concat({int(head.place), stream, entry, task}, ' ') end
  return entry
end

-- Note who was granted a turn, the last of each size: until it ends, the lock is reserved for that of `last`, and no
-- more for those before.
local function note_turns(lock, granted, last, before)
  local ends = int(now_us() / 1000 + TURN_MS)
  for size, turn in pairs(granted) do
    turn = ends .. (size == last and ' 1 ' or ' 0 ') .. turn
    redis.call('SET', '$TURN_PREFIX' .. size .. ':' .. lock.key, turn, 'PX', TURN_NOTED_MS)
  end
  for size, turn in pairs(last and before or {}) do
    if turn.reserved and not granted[size] then
      local others = string.gsub(turn.stored, ' 1 ', ' 0 ', 1)
      redis.call('SET', '$TURN_PREFIX' .. size .. ':' .. lock.key, others, 'PX', TURN_NOTED_MS)
    end
  end
end

-- Readers that wait behind writers join the readers that have the lock, as newcomers do: else these would pass them
-- by for ever. The timer sees to it, among the first in line of each size, and in a part of a long line that is another
-- one each time.
local function waiters_of(line)
  local waiters, length = redis.call('ZRANGE', line, 0, AHEAD - 1, 'WITHSCORES'), redis.call('ZCARD', line)
  if length <= AHEAD then return waiters, false end
  local from = 1 + now_us() % length
  for _, each in ipairs(redis.call('ZRANGE', line, from, from + AHEAD - 1, 'WITHSCORES')) do
    waiters[#waiters + 1] = each
  end
  return waiters, true
end

local function let_readers_join(lock, turns, heads)
  if redis.call('EXISTS', lock.key) == 0 or room_for('shared', lock) < 1 then return end
  local granted, soon = {}, false
  for _, head in ipairs(heads) do
    local waiters, is_long = {}, false
    if not is_untaken(turns[head.size]) then waiters, is_long = waiters_of(head.line) end
    soon = soon or is_long
    for at = 1, #waiters, 2 do
      if string.find(waiters[at], 'shared:', 1, true) == 1 and work_left > 0 then
        head.waiter, head.place = waiters[at], tonumber(waiters[at + 1])
        grant_turn(lock, head, granted)
      end
    end
  end
  note_turns(lock, granted)
  if work_left <= 0 or soon then look_at(lock.key, now_us() / 1000 + math.max(TURN_MS, soon and quiet_ms() or 0)) end
end

-- Grant the turn to those in front, if the lock can be had. `why`: 'released', 'granted' (who asked last left room for
-- more), 'asked' (by a task that must wait), 'unwanted' (by the task that had the turn) or 'timer'. What turns_of() and heads_of() say, if that is known already.
local function grant_next(lock, why, turns, heads, any)
  if why == 'released' and redis.call('EXISTS', of_all_sizes('$WAITING_PREFIX', lock.key)) == 0 then return end
  if work_left <= 0 then return look_at(lock.key, now_us() / 1000) end
  turns = turns or turns_of(lock)
  local reserved = reserved_until(turns)
  -- Only slots are given back while others are on their way to take some.
  if reserved and not (why == 'released' and lock.kind == 'concurrency') then return end
  if not heads then heads, any = heads_of(lock, turns) end
  if not any then return end -- nobody, or no line: its keys are of another type
  local granted, room, last = {}, nil, nil
  while heads[1] and work_left > 0 do
    local head = heads[1]
    local kind = string.match(head.waiter, '^%a+')
    room = room or room_for(kind, lock)
    if reserved or why == 'asked' then room = math.min(room, 1) end
    -- A limiter that is not wanted any more has most likely been lifted, for those behind as well.
    if why == 'unwanted' and not last and (kind == 'rate' or kind == 'concurrency') then room = UNWANTED end
    if room < 1 or (last and kind == 'exclusive') then
      if why == 'timer' and kind == 'exclusive' then let_readers_join(lock, turns, heads) end
      break
    end
    if grant_turn(lock, head, granted) then last, room = head.size, room - 1 end
    local first = redis.call('ZRANGE', head.line, 0, 0, 'WITHSCORES')
    head.waiter, head.place = first[1], tonumber(first[2])
    if not first[1] then table.remove(heads, 1) end
    table.sort(heads, come_first)
  end
  if last then note_turns(lock, granted, last, turns) end
  if not heads[1] and redis.call('EXISTS', of_all_sizes('$WAITING_PREFIX', lock.key)) == 0 then
    redis.pcall('ZREM', '$LINES', lock.key)
  elseif last then
    look_at(lock.key, now_us() / 1000 + TURN_MS + 1)
  elseif work_left <= 0 then
    look_at(lock.key, now_us() / 1000)
  elseif why == 'granted' and lock.limit then
    look_at(lock.key, now_us() / 1000 + look_again_in(lock, math.max(LOOK_MS, quiet_ms())))
  end
end

-- Give locks back and grant the turn to those who wait for them. Returns how many were still held.
local function release_all(locks)
  local released = 0
  for _, lock in ipairs(locks) do
    -- Where a key is not of the type that it should be, there is no lock of ours, and the others are given back.
    local kind = kinds[lock.kind]
    local looked, held = pcall(kind and kind.release, lock)
    if looked and held then
      released = released + 1
      pcall(grant_next, lock, 'released') -- else who waits is found by the timer
    end
  end
  return released
end

-- A task that had the turn for a lock does not take it: the next one, please. What turns_of() says, if that is known.
local function give_up_turn(lock, task, why, turns)
  turns = turns or turns_of(lock)
  for _, size in ipairs(sizes_of_turns(turns, task)) do
    redis.call('DEL', '$TURN_PREFIX' .. size .. ':' .. lock.key)
    turns[size] = nil
  end
  pcall(grant_next, lock, why or 'asked', turns)
end
