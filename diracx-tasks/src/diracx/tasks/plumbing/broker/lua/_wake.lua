-- Lines: who waits for a lock, first come, first served within a priority. Waiters are "{kind of lock}:{task}", and have
-- no timer of their own: the line has one, in `$LINES`. Each grant of a turn is charged to what made it possible: a lock
-- that was given back, a task that was granted one and left room for others, a newcomer, or the timer. So a line in
-- which nothing moves costs nothing.
-- Who is granted a turn asks for its locks as anybody does. A turn is reserved for a moment, and a lock that is not
-- asked for in that time is granted to the next. Of several that are granted side by side, the last has the turn.
local TURN_MS, LOOK_MS, CROWD, BYTES = 1000, 10000, 500, 8192
local work_left = 50 -- waiters that one run of a script looks at, less for large messages; the timer does the rest

-- For how many waiters of a kind there is room. Of a limiter whose limit is unknown here the first is to ask.
local function room_for(kind, lock)
  if kind == 'shared' then return redis.call('HEXISTS', lock.key, 'writer') == 0 and math.huge or 0 end
  if (kind == 'concurrency' or kind == 'rate') and not lock.limit then return 1 end
  if kind == 'concurrency' then
    return lock.limit - redis.call('ZCOUNT', lock.key, '(' .. int(now_us()), '+inf')
  end
  if kind == 'rate' then
    return math.floor((lock.limit - spent(lock, now_us())) / lock.n_items)
  end
  return redis.call('EXISTS', lock.key) == 0 and 1 or 0
end

-- Messages of this stream that no worker has taken yet. While workers are behind, timers send them nothing more.
local function is_crowded(stream)
  local length = redis.call('XLEN', stream)
  if length < CROWD then return false end
  local pending = redis.pcall('XPENDING', stream, '$GROUP')
  return length - (pending.err and 0 or pending[1]) >= CROWD
end

-- Grant the turn to one who waits. Returns whether it has it; nil while workers are behind.
local function grant_turn(lock, waiter, why)
  local task = string.match(waiter, '^%a+:(.*)$')
  local stored = redis.call('HGET', '$DELAYED_DATA', task or '')
  local stream, _, _, _, _, waits_for = parts_of(stored or '')
  work_left = work_left - 1 - #(stored or '') / BYTES
  if not stream or waits_for ~= as_noted(lock.key) then
    redis.call('ZREM', '$WAITING_PREFIX' .. lock.key, waiter) -- whoever this was, waits here no more
    return false
  end
  if why == 'timer' and is_crowded(stream) then return nil end
  return undelay(task, lock.key, stored)
end

-- Readers that wait behind writers join the readers that have the lock, as newcomers do: else these would pass them
-- by for ever. The timer sees to it, among the first in line.
local function let_readers_join(lock)
  if redis.call('EXISTS', lock.key) == 0 or room_for('shared', lock) < 1 then return end
  for _, waiter in ipairs(redis.call('ZRANGE', '$WAITING_PREFIX' .. lock.key, 0, CROWD - 1)) do
    if work_left <= 0 then return look_at(lock.key, now_us() / 1000 + TURN_MS) end
    if string.find(waiter, 'shared:', 1, true) == 1 and grant_turn(lock, waiter, 'timer') == nil then return end
  end
end

-- Grant the turn to those in front, if the lock can be had. `why`: 'released', 'granted' (who asked last left room for
-- more), 'asked' (by somebody who must wait) or 'timer'.
local function grant_next(lock, why)
  local waiting, turn = '$WAITING_PREFIX' .. lock.key, '$TURN_PREFIX' .. lock.key
  local first, room, last = redis.pcall('ZRANGE', waiting, 0, 0, 'WITHSCORES'), nil, nil
  if not first[1] then return end -- nobody, or no line: its key is of another type
  local reserved = redis.pcall('GET', turn)
  -- Only slots are given back while others are on their way to take some.
  if reserved and not (why == 'released' and lock.kind == 'concurrency') then return end
  while first[1] do
    local kind, task = string.match(first[1], '^(%a+):(.*)$')
    room = room or room_for(kind, lock)
    if reserved or why == 'asked' then room = math.min(room, 1) end
    if room < 1 or (last and kind == 'exclusive') then
      if why == 'timer' and kind == 'exclusive' then let_readers_join(lock) end
      break
    end
    if work_left <= 0 then return look_at(lock.key, now_us() / 1000 + (last and TURN_MS + 1 or 0)) end
    local granted = grant_turn(lock, first[1], why)
    if granted == nil then return look_at(lock.key, now_us() / 1000 + TURN_MS) end
    if granted then
      last, room = int(tonumber(first[2])) .. ':' .. task, room - 1
      redis.call('SET', turn, last, 'PX', TURN_MS)
    end
    first = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
  end
  if not first[1] then
    redis.pcall('ZREM', '$LINES', lock.key)
  elseif last then
    look_at(lock.key, now_us() / 1000 + TURN_MS + 1)
  elseif why == 'granted' and lock.limit then
    look_at(lock.key, now_us() / 1000 + look_again_in(lock, LOOK_MS))
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
      pcall(grant_next, lock, 'released') -- else whoever waits is found by the timer
    end
  end
  return released
end

-- A task that had the turn for a lock does not take it: the next one, please.
local function give_up_turn(lock, task)
  if turn_of(lock) == task then redis.call('DEL', '$TURN_PREFIX' .. lock.key) end
  pcall(grant_next, lock, 'asked')
end
