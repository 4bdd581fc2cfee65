-- Lines: the tasks that wait for a lock, first come, first served within a priority. Waiters are "{kind of
-- lock}:{task}". Only the line has a timer, in `$LINES`. A lock is granted in the script that makes that possible:
-- the release of a lock, a take that leaves room for more, a new waiter, or the timer. So an idle line costs only the
-- timer, which polls at most `POLLS_PER_SECOND` lines. A task with a grant takes its locks like any other. The lock is
-- reserved for it for a short time, and then granted to the next; while that task still waits for a worker, only to
-- tasks of other sizes. Of several tasks of one size that are granted a lock together, the last has the grant.
local RESERVATION_KEPT_MS, POLL_MS, AHEAD, BYTES, UNWANTED = 3600000, 10000, 500, 8192, 10
local work_left = 40 -- waiters that one script examines, fewer with large messages; the timer does the rest

-- Grants the lock to a waiter, `head` of heads_of(), and adds it to `granted`. Returns false if it is no longer valid.
local function grant_to(lock, head, granted)
  local task = string.match(head.waiter, '^[^:]+:(.*)$')
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

-- Stores the last grant of each size. The lock is reserved for that of size `last`, and no longer for earlier ones.
local function store_grants(lock, granted, last, before)
  local ends = int(now_us() / 1000 + RESERVATION_MS)
  for size, grant in pairs(granted) do
    grant = ends .. (size == last and ' 1 ' or ' 0 ') .. grant
    redis.call('SET', '$RESERVATION_PREFIX' .. size .. ':' .. lock.key, grant, 'PX', RESERVATION_KEPT_MS)
  end
  for size, grant in pairs(last and before or {}) do
    if grant.valid_until and not granted[size] then
      local others = string.gsub(grant.stored, ' 1 ', ' 0 ', 1)
      redis.call('SET', '$RESERVATION_PREFIX' .. size .. ':' .. lock.key, others, 'PX', RESERVATION_KEPT_MS)
    end
  end
end

-- Lets waiters of a kind that `joins`, such as readers behind a writer, join those that hold the lock, as new ones do;
-- otherwise new ones would overtake them forever. The timer does this for the first waiters of each size, and for a
-- random part of a long line.
local function waiters_of(line)
  local waiters, length = redis.call('ZRANGE', line, 0, AHEAD - 1, 'WITHSCORES'), redis.call('ZCARD', line)
  if length <= AHEAD then return waiters, false end
  local from = 1 + now_us() % length
  for _, each in ipairs(redis.call('ZRANGE', line, from, from + AHEAD - 1, 'WITHSCORES')) do
    waiters[#waiters + 1] = each
  end
  return waiters, true
end

local function let_join(lock, kind, grants, heads)
  if redis.call('EXISTS', lock.key) == 0 or kinds[kind].room(lock) < 1 then return end
  local granted, soon = {}, false
  for _, head in ipairs(heads) do
    local waiters, is_long = {}, false
    if not is_untaken(grants[head.size]) then waiters, is_long = waiters_of(head.line) end
    soon = soon or is_long
    for at = 1, #waiters, 2 do
      if string.find(waiters[at], kind .. ':', 1, true) == 1 and work_left > 0 then
        head.waiter, head.place = waiters[at], tonumber(waiters[at + 1])
        grant_to(lock, head, granted)
      end
    end
  end
  store_grants(lock, granted)
  if work_left <= 0 or soon then schedule_poll(lock.key, now_us() / 1000 + math.max(RESERVATION_MS, soon and quiet_ms() or 0)) end
end

-- Grants the lock to the first waiters, if it is free. `reason`: 'released', 'granted' (the last take left room for
-- more), 'waiting' (by a task that must wait), 'unwanted' (by the task that had a grant) or 'timer'. `grants`, `heads`
-- and `any` are the results of grants_of() and heads_of(), if known already.
local function grant_next(lock, reason, grants, heads, any)
  if reason == 'released' and redis.call('EXISTS', of_all_sizes('$WAITING_PREFIX', lock.key)) == 0 then return end
  if work_left <= 0 then return schedule_poll(lock.key, now_us() / 1000) end
  grants = grants or grants_of(lock)
  local reserved = reserved_until(grants)
  -- During a reservation, only a released slot can be granted to a further task.
  if reserved and not (reason == 'released' and kind_of(lock.kind).limiter) then return end
  if not heads then heads, any = heads_of(lock, grants) end
  if not any then return end -- no waiter, or a key of the wrong type
  local granted, room, last = {}, nil, nil
  while heads[1] and work_left > 0 do
    local head = heads[1]
    local kind = kind_of(string.match(head.waiter, '^[^:]+'))
    room = room or kind.room(lock)
    if reserved or reason == 'waiting' then room = math.min(room, 1) end
    -- A limiter that its task no longer needs was most likely disabled, for the tasks behind as well.
    if reason == 'unwanted' and not last and kind.limiter then room = UNWANTED end
    if room < 1 or (last and kind.alone) then
      if reason == 'timer' and kind.joined_by then let_join(lock, kind.joined_by, grants, heads) end
      break
    end
    if grant_to(lock, head, granted) then last, room = head.size, room - 1 end
    local first = redis.call('ZRANGE', head.line, 0, 0, 'WITHSCORES')
    head.waiter, head.place = first[1], tonumber(first[2])
    if not first[1] then table.remove(heads, 1) end
    table.sort(heads, come_first)
  end
  if last then store_grants(lock, granted, last, grants) end
  if not heads[1] and redis.call('EXISTS', of_all_sizes('$WAITING_PREFIX', lock.key)) == 0 then
    redis.pcall('ZREM', '$LINES', lock.key)
  elseif last then
    schedule_poll(lock.key, now_us() / 1000 + RESERVATION_MS + 1)
  elseif work_left <= 0 then
    schedule_poll(lock.key, now_us() / 1000)
  elseif reason == 'granted' and lock.limit then
    schedule_poll(lock.key, now_us() / 1000 + poll_delay(lock, math.max(POLL_MS, quiet_ms())))
  end
end

-- Releases locks and grants them to waiting tasks. Returns how many were still held.
local function release_all(locks)
  local released = 0
  for _, lock in ipairs(locks) do
    -- A key of the wrong type is skipped, and the other locks are released.
    local kind = kinds[lock.kind]
    local ok, held = pcall(kind and kind.release, lock)
    if ok and held then
      released = released + 1
      pcall(grant_next, lock, 'released') -- after an error, the timer finds the waiters
    end
  end
  return released
end

-- Gives up a task's grant, and grants the lock to the next. `grants`: result of grants_of(), if known.
local function give_up_grant(lock, task, reason, grants)
  grants = grants or grants_of(lock)
  for _, size in ipairs(sizes_granted(grants, task)) do
    redis.call('DEL', '$RESERVATION_PREFIX' .. size .. ':' .. lock.key)
    grants[size] = nil
  end
  pcall(grant_next, lock, reason or 'waiting', grants)
end
