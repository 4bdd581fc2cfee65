-- The five locks. A lock is a table: kind, key, owner, and ttl_ms | limit, window_us, n_items.
-- Each kind has take (-> granted, time in µs when to try again if that is known), undo, release
-- (-> did it change anything) and keep (-> still ours, renewed).
local kinds = {}

kinds.mutex = {
  take = function(lock)
    return redis.call('SET', lock.key, lock.owner, 'NX', 'PX', lock.ttl_ms) and true or false
  end,
  release = function(lock)
    if redis.call('GET', lock.key) ~= lock.owner then return false end
    return redis.call('DEL', lock.key) == 1
  end,
  keep = function(lock)
    if redis.call('GET', lock.key) ~= lock.owner then return false end
    return redis.call('PEXPIRE', lock.key, lock.ttl_ms) == 1
  end,
}

-- One hash for both sides: `writer_owner` with a TTL on the key, or `readers` (a counter, no TTL) and a
-- field for each reader, which makes taking and giving back the same hold twice harmless.
kinds.exclusive = {
  take = function(lock)
    if redis.call('EXISTS', lock.key) == 1 then return false end
    redis.call('HSET', lock.key, 'writer_owner', lock.owner)
    redis.call('PEXPIRE', lock.key, lock.ttl_ms)
    return true
  end,
  release = function(lock)
    if redis.call('HGET', lock.key, 'writer_owner') ~= lock.owner then return false end
    return redis.call('DEL', lock.key) == 1
  end,
  keep = function(lock)
    if redis.call('HGET', lock.key, 'writer_owner') ~= lock.owner then return false end
    return redis.call('PEXPIRE', lock.key, lock.ttl_ms) == 1
  end,
}

kinds.shared = {
  take = function(lock)
    if redis.call('HEXISTS', lock.key, 'writer_owner') == 1 then return false end
    if redis.call('HSETNX', lock.key, 'reader:' .. lock.owner, 1) == 1 then
      redis.call('HINCRBY', lock.key, 'readers', 1)
    end
    return true
  end,
  release = function(lock)
    if redis.call('HDEL', lock.key, 'reader:' .. lock.owner) == 0 then return false end
    if redis.call('HINCRBY', lock.key, 'readers', -1) <= 0 then redis.call('DEL', lock.key) end
    return true
  end,
  keep = function(lock)
    return redis.call('HEXISTS', lock.key, 'reader:' .. lock.owner) == 1
  end,
}

-- Tasks that share a key may have different times.
local function live_at_least(key, ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, int(ms)) end
end

-- A sliding-window log that never scans: each grant is a member "{units granted so far}:{units}:{owner}"
-- scored with its time, so the units inside the window are a difference of two running totals.
-- A long log has one member for all grants of a thousandth of the window, with the time of the last of them.
local LONG_LOG = 1000
local function grant(member)
  local total, units = string.match(member, '^(%d+):(%d+):')
  return tonumber(total), tonumber(units)
end

-- When quota returns for a refused lock (µs): the grants leave the window in the order in which they came.
local function retry_after(lock)
  local newest = redis.call('ZRANGE', lock.key, -1, -1)[1]
  if not newest then return now_us() + lock.window_us end -- it asks for more than the limit
  local leave = grant(newest) + lock.n_items - lock.limit
  local low, high = 0, redis.call('ZCARD', lock.key) - 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if grant(redis.call('ZRANGE', lock.key, middle, middle)[1]) >= leave then
      high = middle
    else
      low = middle + 1
    end
  end
  local last = redis.call('ZRANGE', lock.key, low, low, 'WITHSCORES')
  return tonumber(last[2]) + lock.window_us + 1
end

-- The units inside the window that ends now, the total ever granted, and the last grant inside the window.
local function spent(lock, now)
  local newest = redis.call('ZRANGE', lock.key, -1, -1, 'WITHSCORES')
  if newest[2] and tonumber(newest[2]) > now then
    -- The clock was set back. How long ago these were granted is not known: at the latest, now.
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', lock.key, '(' .. int(now), '+inf')) do
      redis.call('ZADD', lock.key, int(now), member)
    end
    newest[2] = int(now)
  end
  -- A grant exactly one window old still counts: both ends of a window belong to it.
  local from = int(now - lock.window_us)
  -- Another class may have a wider window on this key, which shows in how long the log lives.
  trim(lock.key, '(' .. int(now - math.max(lock.window_us, redis.call('PTTL', lock.key) * 1000)))
  local oldest = redis.call('ZRANGEBYSCORE', lock.key, from, '+inf', 'LIMIT', 0, 1)[1]
  if not oldest then return 0, newest[1] and grant(newest[1]) or 0, {} end
  local total, first_total, first_units = grant(newest[1]), grant(oldest)
  return total - first_total + first_units, total, newest
end

-- The last grant, if the next one is to be merged into it.
local function mergeable(lock, now, newest)
  local part_us = lock.window_us / LONG_LOG
  if not newest[2] or math.floor(newest[2] / part_us) ~= math.floor(now / part_us) then return nil end
  return redis.call('ZCARD', lock.key) >= LONG_LOG and newest
end

kinds.rate = {
  take = function(lock, now)
    local used, total, newest = spent(lock, now)
    local life_ms = math.ceil(lock.window_us / 500) -- two windows: see spent()
    if used + lock.n_items <= lock.limit then
      local units = lock.n_items
      lock.merged = mergeable(lock, now, newest)
      if lock.merged then
        units = units + select(2, grant(newest[1]))
        redis.call('ZREM', lock.key, newest[1])
      end
      lock.member = string.format('%016.0f:%.0f:%s', total + lock.n_items, units, lock.owner)
      redis.call('ZADD', lock.key, int(now), lock.member)
      live_at_least(lock.key, life_ms)
      return true
    end
    live_at_least(lock.key, life_ms)
    return false, retry_after(lock)
  end,
  undo = function(lock)
    redis.call('ZREM', lock.key, lock.member)
    if lock.merged then redis.call('ZADD', lock.key, lock.merged[2], lock.merged[1]) end
  end,
  release = function() return false end, -- quota is never given back
  keep = function() return true end,
}

-- Each slot ends by its score. The set lives longer, for version 0.7 renews its slots and not the set.
local SLOTS_MS = 86400000
kinds.concurrency = {
  take = function(lock, now)
    trim(lock.key, in_ms(now))
    local from, expires = '(' .. in_ms(now), redis.call('ZSCORE', lock.key, lock.owner)
    if tonumber(expires or 0) <= now / 1000 and redis.call('ZCOUNT', lock.key, from, '+inf') >= lock.limit then
      return false
    end
    redis.call('ZADD', lock.key, in_ms(now + lock.ttl_ms * 1000), lock.owner)
    live_at_least(lock.key, math.max(lock.ttl_ms, SLOTS_MS))
    return true
  end,
  release = function(lock) return redis.call('ZREM', lock.key, lock.owner) == 1 end,
  keep = function(lock, now)
    local expires = redis.call('ZSCORE', lock.key, lock.owner)
    if not expires or tonumber(expires) <= now / 1000 then return false end
    redis.call('ZADD', lock.key, 'XX', in_ms(now + lock.ttl_ms * 1000), lock.owner)
    live_at_least(lock.key, math.max(lock.ttl_ms, SLOTS_MS))
    return true
  end,
}

-- Who was granted the turn to take a lock and has not asked for it since, the last of each size; and until when (ms)
-- nobody behind one of them may take it, if that is so. Noted as "{ends} {1: reserved} {place} {stream} {entry} {task}".
-- A task that another lock refused may keep its turn while it waits for that one (see start.lua). Noted as
-- "{ends} 2 {place} {kind of the other lock} {bytes of task} {task}{key of the other lock}".
local TURN_MS, KEPT_MS = 1000, 3600000
local RESERVATION = '^(%d+) ([012]) (%d+) (%S+) (%S+) (.*)$'

-- Whether a task waits for a lock, or has the turn for it.
local function waits_still(task, size, kind, key, now_ms)
  if type(redis.pcall('ZSCORE', '$WAITING_PREFIX' .. size .. ':' .. key, kind .. ':' .. task)) == 'string' then
    return true
  end
  local turn = redis.pcall('GET', '$TURN_PREFIX' .. size .. ':' .. key)
  local ends, flag, _, _, _, has = string.match(type(turn) == 'string' and turn or '', RESERVATION)
  return has == task and flag ~= '2' and tonumber(ends) > now_ms
end

local function turns_of(lock)
  local turns, now_ms = {}, now_us() / 1000
  for position, stored in ipairs(redis.call('MGET', of_all_sizes('$TURN_PREFIX', lock.key))) do
    local ends, flag, place, stream, entry, task = string.match(stored or '', RESERVATION)
    if task then
      local size, longest = EACH_SIZE[position], TURN_MS
      local turn = {place = tonumber(place), stream = stream, entry = entry, task = task, stored = stored}
      if flag == '2' then
        local bytes = tonumber(entry) or 0
        turn.kept, turn.task, longest = true, string.sub(task, 1, bytes), KEPT_MS
        turn.expired = not waits_still(turn.task, size, stream, string.sub(task, bytes + 1), now_ms)
      end
      -- None lasts longer than that, also when the clock was set back.
      turn.expired = turn.expired or tonumber(ends) <= now_ms or tonumber(ends) > now_ms + longest + 1
      turn.reserved = flag ~= '0' and not turn.expired and tonumber(ends)
      turns[size] = turn
    end
  end
  return turns
end

-- Until when (ms) the lock is reserved for one of them, or nil.
local function reserved_until(turns)
  for _, turn in pairs(turns) do
    if turn.reserved then return turn.reserved end
  end
end

-- The sizes for which a task has the turn.
local function sizes_of_turns(turns, task)
  local sizes = {}
  for size, turn in pairs(turns) do
    if turn.task == task then sizes[#sizes + 1] = size end
  end
  return sizes
end

-- Whether a task that was granted a turn still waits for a worker.
local function is_untaken(turn)
  local found = turn and not turn.kept and redis.pcall('XRANGE', turn.stream, turn.entry, turn.entry)
  if not found or not found[1] then return false end
  local pending = redis.pcall('XPENDING', turn.stream, '$GROUP', turn.entry, turn.entry, 1)
  return pending.err ~= nil or not pending[1]
end

local function come_first(one, other)
  return one.place < other.place
end

-- The first in line of each size, in their order; and one who waits, if anybody does. Those of a size whose worker did not
-- come in time for the last one are left out until it has: then that one has its place in line again, before them.
-- `before`: only those that stand before this place.
local function heads_of(lock, turns, before)
  local heads, any = {}, nil
  for position, line in ipairs({of_all_sizes('$WAITING_PREFIX', lock.key)}) do
    local first = redis.pcall('ZRANGE', line, 0, 0, 'WITHSCORES') -- an error where its key is of another type
    local size, place = EACH_SIZE[position], tonumber(first[2])
    local turn = place and turns[size]
    any = any or first[1]
    if place and place < (before or math.huge) and not (turn and turn.expired and turn.place <= place and is_untaken(turn)) then
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

-- Who is to have the lock before a task: 'turn' (it is reserved), 'line' (a task waits), or nobody.
-- Those that would stand before all of these need not wait: two tasks that want the same two locks, each with the
-- turn of one of them, would else refuse each other for ever. Readers join readers, also when others wait.
local function goes_before(lock, turns, task, place)
  local before
  for _, turn in pairs(turns) do
    if turn.reserved and turn.task == task then return nil end
    if turn.reserved and turn.place < place then before = 'turn' end
  end
  if before or not heads_of(lock, turns, place)[1] then return before end
  return not (lock.kind == 'shared' and redis.call('EXISTS', lock.key) == 1) and 'line' or nil
end

-- Whether anybody waits for a lock, or was granted the turn for it.
local function waits_or_turns(lock)
  local small, medium, large = of_all_sizes('$WAITING_PREFIX', lock.key)
  return redis.call('EXISTS', small, medium, large, of_all_sizes('$TURN_PREFIX', lock.key)) > 0
end

-- All of the locks or none of them: a refusal gives back what was taken before it, quota included, and so does a
-- lock that cannot be taken at all, as one whose key is of another type: that is an error.
-- `task` and its `place` in line are nil for a lock that is taken outside the task system.
-- Each lock that was asked for knows its turns, if anybody waits for it (`turns`), or that nobody does (false).
-- Returns true and the locks for which others wait too, or false, the position of the refusing lock, when to try
-- again (µs, or nil), and who goes before if that is why.
local function take_all(locks, now, task, place)
  local wanted, ended = {}, {}
  for position, lock in ipairs(locks) do
    local before
    lock.turns = task and waits_or_turns(lock) and turns_of(lock)
    if lock.turns then
      local turns = lock.turns
      before = goes_before(lock, turns, task, place)
      wanted[#wanted + 1] = lock
      local alone = lock.kind == 'mutex' or lock.kind == 'exclusive'
      for size, turn in pairs(turns) do
        if turn.task == task or (alone and turn.reserved) then
          ended[#ended + 1] = '$TURN_PREFIX' .. size .. ':' .. lock.key
        end
      end
    end
    local looked, granted, again = true, false, nil
    if not before then looked, granted, again = pcall(take, lock, now) end
    -- A worker that lost the connection while it asked, asks again: what it got then is still its own, no matter whose
    -- turn it is now.
    if looked and not granted and task and lock.kind ~= 'rate' then
      looked, granted = pcall(kinds[lock.kind].keep, lock, now)
    end
    if not looked or not granted then
      for taken = looked and position - 1 or position, 1, -1 do undo(locks[taken]) end
      if not looked then error(type(granted) == 'table' and granted or {err = granted}) end
      -- And so may be what comes behind: nobody else would ever give it back.
      for behind = position + 1, task and #locks or 0 do undo(locks[behind]) end
      return false, position, again, before
    end
  end
  for _, turn in ipairs(ended) do redis.call('DEL', turn) end
  return true, wanted
end

-- When the timer should look at a refusing lock again (ms from now): when it can be had at the latest, if that is soon.
local function look_again_in(lock, at_most_ms)
  local left = -1
  if lock.kind == 'concurrency' then
    local first = redis.call('ZRANGE', lock.key, 0, 0, 'WITHSCORES')[2]
    left = first and tonumber(first) - now_us() / 1000 or -1
  elseif lock.kind ~= 'rate' then
    left = redis.call('PTTL', lock.key)
  elseif lock.limit then
    left = (retry_after(lock) - now_us()) / 1000
  end
  return left >= 0 and math.min(left + 1, at_most_ms) or at_most_ms
end

-- A worker's held-locks record: "{owner}:{key}" -> "{kind} {limit}", to give its locks back should it die.
local function held_line(lock)
  return lock.owner .. ':' .. lock.key, lock.kind .. ' ' .. (lock.limit and int(lock.limit) or '')
end

-- The locks in lines of a held-locks record, which has other ones as well (see orphan() in _pending.lua).
local function locks_in(lines)
  local locks = {}
  for line = 1, #lines, 2 do
    local kind, limit = string.match(lines[line + 1], '^(%a+) (%d*)$')
    local owner, key = string.match(lines[line], '^([^:]*):(.*)$')
    if kind then locks[#locks + 1] = {kind = kind, key = key, owner = owner, limit = tonumber(limit)} end
  end
  return locks
end
