-- Grants of a lock: for each size, the last task in line that was granted it and has not taken it yet, and the time
-- (ms) until which the lock is reserved for it. Stored as "{ends} {1: reserved} {place} {stream} {entry} {task}".
-- A task that another lock refused may keep its grant while it waits for that one (see start.lua). Stored as
-- "{ends} 2 {place} {kind of the other lock} {bytes of task} {task}{key of the other lock}".
local RESERVATION_MS, KEPT_MS = 1000, 3600000
local RESERVATION = '^(%d+) ([012]) (%d+) (%S+) (%S+) (.*)$'

-- True if a task waits for a lock, or has a grant for it.
local function waits_still(task, size, kind, key, now_ms)
  if type(redis.pcall('ZSCORE', '$WAITING_PREFIX' .. size .. ':' .. key, kind .. ':' .. task)) == 'string' then
    return true
  end
  local grant = redis.pcall('GET', '$RESERVATION_PREFIX' .. size .. ':' .. key)
  local ends, flag, _, _, _, has = string.match(type(grant) == 'string' and grant or '', RESERVATION)
  return has == task and flag ~= '2' and tonumber(ends) > now_ms
end

local function grants_of(lock)
  local grants, now_ms = {}, now_us() / 1000
  for position, stored in ipairs(redis.call('MGET', of_all_sizes('$RESERVATION_PREFIX', lock.key))) do
    local ends, flag, place, stream, entry, task = string.match(stored or '', RESERVATION)
    if task then
      local size, longest = EACH_SIZE[position], RESERVATION_MS
      local grant = {place = tonumber(place), stream = stream, entry = entry, task = task, stored = stored}
      if flag == '2' then
        local bytes = tonumber(entry) or 0
        grant.kept, grant.task, longest = true, string.sub(task, 1, bytes), KEPT_MS
        grant.expired = not waits_still(grant.task, size, stream, string.sub(task, bytes + 1), now_ms)
      end
      -- A grant that ends later got its time before the clock was set back.
      grant.expired = grant.expired or tonumber(ends) <= now_ms or tonumber(ends) > now_ms + longest + 1
      grant.valid_until = flag ~= '0' and not grant.expired and tonumber(ends)
      grants[size] = grant
    end
  end
  return grants
end

-- Time (ms) until which the lock is reserved for one of the grants, or nil.
local function reserved_until(grants)
  for _, grant in pairs(grants) do
    if grant.valid_until then return grant.valid_until end
  end
end

-- Sizes of the grants that a task has.
local function sizes_granted(grants, task)
  local sizes = {}
  for size, grant in pairs(grants) do
    if grant.task == task then sizes[#sizes + 1] = size end
  end
  return sizes
end

-- True if no worker has fetched the task of a grant yet.
local function is_untaken(grant)
  local found = grant and not grant.kept and redis.pcall('XRANGE', grant.stream, grant.entry, grant.entry)
  if not found or not found[1] then return false end
  local pending = redis.pcall('XPENDING', grant.stream, '$GROUP', grant.entry, grant.entry, 1)
  return pending.err ~= nil or not pending[1]
end

local function come_first(one, other)
  return one.place < other.place
end

-- The first waiting task of each size, by place; and any one waiting task, or nil. A size is left out if its last grant
-- has expired before a worker fetched the task: that task will take its place again, before them.
-- `before`: only tasks before this place.
local function heads_of(lock, grants, before)
  local heads, any = {}, nil
  for position, line in ipairs({of_all_sizes('$WAITING_PREFIX', lock.key)}) do
    local first = redis.pcall('ZRANGE', line, 0, 0, 'WITHSCORES') -- an error where its key is of another type
    local size, place = EACH_SIZE[position], tonumber(first[2])
    local grant = place and grants[size]
    any = any or first[1]
    if place and place < (before or math.huge) and not (grant and grant.expired and grant.place <= place and is_untaken(grant)) then
      heads[#heads + 1] = {waiter = first[1], place = place, size = size, line = line}
    end
  end
  table.sort(heads, come_first)
  return heads, any
end

local function take(lock, now)
  return kinds[lock.kind].take(lock, now)
end

local function undo(lock)
  local kind = kinds[lock.kind]
  if kind then pcall(kind.undo or kind.release, lock) end
end

-- Reason why a task must leave the lock to another: 'reserved' (it is reserved), 'line' (another task waits), or nil.
-- A task with a place before all of these may take it: two tasks that need the same two locks, each with a grant of
-- one, would otherwise refuse each other forever. Readers join readers, also while writers wait: `joins`.
local function goes_before(lock, grants, task, place)
  local before
  for _, grant in pairs(grants) do
    if grant.valid_until and grant.task == task then return nil end
    if grant.valid_until and grant.place < place then before = 'reserved' end
  end
  if before or not heads_of(lock, grants, place)[1] then return before end
  return not (kind_of(lock.kind).joins and redis.call('EXISTS', lock.key) == 1) and 'line' or nil
end

-- True if a task waits for a lock, or was granted it.
local function is_awaited(lock)
  local small, medium, large = of_all_sizes('$WAITING_PREFIX', lock.key)
  return redis.call('EXISTS', small, medium, large, of_all_sizes('$RESERVATION_PREFIX', lock.key)) > 0
end

-- Takes all of the locks or none: a refusal releases the locks taken before it, including quota, and so does an error,
-- such as a key of the wrong type.
-- `task` and its `place` in line are nil for locks outside the task system.
-- Sets `grants` of each examined lock: its grants if a task waits for it, else false.
-- Returns true and the locks for which other tasks wait, or false, the position of the refusing lock, the time of the
-- next attempt (µs, or nil), and the result of goes_before() if that is the reason.
local function take_all(locks, now, task, place)
  local wanted, ended = {}, {}
  for position, lock in ipairs(locks) do
    local before, kind = nil, kind_of(lock.kind)
    lock.grants = task and is_awaited(lock) and grants_of(lock)
    if lock.grants then
      local grants = lock.grants
      before = goes_before(lock, grants, task, place)
      wanted[#wanted + 1] = lock
      for size, grant in pairs(grants) do
        if grant.task == task or (kind.alone and grant.valid_until) then
          ended[#ended + 1] = '$RESERVATION_PREFIX' .. size .. ':' .. lock.key
        end
      end
    end
    local ok, granted, again = true, false, nil
    if not before then ok, granted, again = pcall(take, lock, now) end
    -- A worker repeats a call whose reply was lost: locks taken then stay its own, even if they were granted to
    -- another task since.
    if ok and not granted and task and not kind.quota then
      ok, granted = pcall(kind.keep, lock, now)
    end
    if not ok or not granted then
      for taken = ok and position - 1 or position, 1, -1 do undo(locks[taken]) end
      if not ok then error(type(granted) == 'table' and granted or {err = granted}) end
      -- The locks behind may be held from such a call, too: release them, for no other process would.
      for behind = position + 1, task and #locks or 0 do undo(locks[behind]) end
      return false, position, again, before
    end
  end
  for _, grant in ipairs(ended) do redis.call('DEL', grant) end
  return true, wanted
end

-- Time to the next poll of a refusing lock (ms): until it is free at the latest, but at most `at_most_ms`.
local function poll_delay(lock, at_most_ms)
  local left = kind_of(lock.kind).free_in(lock)
  return left and left >= 0 and math.min(left + 1, at_most_ms) or at_most_ms
end

-- Held-locks record of a worker: "{owner}:{key}" -> "{kind} {limit}", to release its locks if it crashes.
local function held_line(lock)
  return lock.owner .. ':' .. lock.key, lock.kind .. ' ' .. (lock.limit and int(lock.limit) or '')
end

-- Parses locks of a held-locks record, which also has other fields (see orphan() in _pending.lua).
local function locks_in(lines)
  local locks = {}
  for line = 1, #lines, 2 do
    local kind, limit = string.match(lines[line + 1], '^(%S+) (%d*)$')
    local owner, key = string.match(lines[line], '^([^:]*):(.*)$')
    if kind then locks[#locks + 1] = {kind = kind, key = key, owner = owner, limit = tonumber(limit)} end
  end
  return locks
end
