-- The kinds of lock, one table each. A lock is a table: kind, key, owner, and ttl_ms | limit, window_us, n_items.
-- The timer of a line knows only kind and key; the release of a dead worker's locks also owner and limit.
-- Functions of a kind:
--   take(lock, now)    -> granted, time of the next attempt (µs) if known
--   keep(lock, now)    -> true if the owner still holds it; renewed
--   release(lock)      -> true if the owner held it
--   undo(lock)         reverts a take of the same script; by default release
--   room(lock)         -> number of waiting tasks that can be granted it now; 1 if `limit` is unknown: that task will
--                      check
--   free_in(lock)      -> ms until it is free at the latest; below 0 or nil: unknown
--   reserve(lock, task, ms), unreserve(lock, task) -> true if it was: keeps one slot for a task that another lock
--                      refuses; only if several may hold the lock and others can use the rest meanwhile
-- Properties of a kind:
--   alone      its holder excludes all others
--   limiter    several may hold it, up to a limit; that is a setting, so a waiting task may need it no longer
--   quota      it has no holders: what was taken is never given back
--   joins      while locks of this kind are held, it is granted without regard to the line
--   joined_by  kind that `joins`, and may wait behind this one
local kinds = {}

-- The kind of that name. No name, or that of a later version: a mutex, which is free or held.
local function kind_of(name)
  return kinds[name] or kinds.mutex
end

local function room_if_free(lock)
  return redis.call('EXISTS', lock.key) == 0 and 1 or 0
end

local function time_to_live(lock)
  return redis.call('PTTL', lock.key)
end

kinds.mutex = {
  alone = true,
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
  room = room_if_free,
  free_in = time_to_live,
}

-- One hash for both sides: `writer_owner` with a TTL on the key, or `readers` (a counter, no TTL) and a
-- field for each reader, so that a repeated take or release by the same owner changes nothing.
kinds.exclusive = {
  alone = true,
  joined_by = 'shared',
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
  room = room_if_free,
  free_in = time_to_live,
}

kinds.shared = {
  joins = true,
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
  room = function(lock) return redis.call('HEXISTS', lock.key, 'writer_owner') == 0 and math.huge or 0 end,
  free_in = time_to_live,
}

-- Extends a key's time to live to `ms`; never shortens it, for tasks that share the key may have different times.
local function live_at_least(key, ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, int(ms)) end
end

-- A sliding-window log that never scans: each grant is a member "{units granted so far}:{units}:{owner}"
-- scored with its time, so the units inside the window are a difference of two running totals.
-- A long log has one member for all grants of a thousandth of the window, with the time of the last of them.
local LONG_LOG = 1000
local function parse_member(member)
  local total, units = string.match(member, '^(%d+):(%d+):')
  return tonumber(total), tonumber(units)
end

-- Time at which a refused lock can be granted (µs): the earliest grants leave the window first.
local function retry_after(lock)
  local newest = redis.call('ZRANGE', lock.key, -1, -1)[1]
  if not newest then return now_us() + lock.window_us end -- it requests more than the limit
  local leave = parse_member(newest) + lock.n_items - lock.limit
  local low, high = 0, redis.call('ZCARD', lock.key) - 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if parse_member(redis.call('ZRANGE', lock.key, middle, middle)[1]) >= leave then
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
    -- The clock was set back. The time of these grants is unknown, at the latest now.
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', lock.key, '(' .. int(now), '+inf')) do
      redis.call('ZADD', lock.key, int(now), member)
    end
    newest[2] = int(now)
  end
  -- A grant exactly one window old still counts: both ends of a window belong to it.
  local from = int(now - lock.window_us)
  -- Another class may use a wider window on this key: the log's time to live is two of the widest windows.
  trim(lock.key, '(' .. int(now - math.max(lock.window_us, redis.call('PTTL', lock.key) * 1000)))
  local oldest = redis.call('ZRANGEBYSCORE', lock.key, from, '+inf', 'LIMIT', 0, 1)[1]
  if not oldest then return 0, newest[1] and parse_member(newest[1]) or 0, {} end
  local total, first_total, first_units = parse_member(newest[1]), parse_member(oldest)
  return total - first_total + first_units, total, newest
end

-- The last grant, if the next one is to be merged into it.
local function mergeable(lock, now, newest)
  local part_us = lock.window_us / LONG_LOG
  if not newest[2] or math.floor(newest[2] / part_us) ~= math.floor(now / part_us) then return nil end
  return redis.call('ZCARD', lock.key) >= LONG_LOG and newest
end

kinds.rate = {
  limiter = true,
  quota = true,
  take = function(lock, now)
    local used, total, newest = spent(lock, now)
    local life_ms = math.ceil(lock.window_us / 500) -- two windows: see spent()
    if used + lock.n_items <= lock.limit then
      local units = lock.n_items
      lock.merged = mergeable(lock, now, newest)
      if lock.merged then
        units = units + select(2, parse_member(newest[1]))
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
  release = function() return false end,
  keep = function() return true end,
  room = function(lock)
    return lock.limit and math.floor((lock.limit - spent(lock, now_us())) / lock.n_items) or 1
  end,
  free_in = function(lock) return lock.limit and (retry_after(lock) - now_us()) / 1000 end,
}

-- Each slot ends by its score. The set lives longer, for version 0.7 renews its slots and not the set.
local SLOTS_MS, KEPT_SLOT = 86400000, 'kept:'
kinds.concurrency = {
  limiter = true,
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
  room = function(lock)
    return lock.limit and lock.limit - redis.call('ZCOUNT', lock.key, '(' .. in_ms(now_us()), '+inf') or 1
  end,
  free_in = function(lock)
    local first = redis.call('ZRANGE', lock.key, 0, 0, 'WITHSCORES')[2]
    return first and tonumber(first) - now_us() / 1000
  end,
  reserve = function(lock, task, ms)
    redis.call('ZADD', lock.key, int(now_us() / 1000 + ms), KEPT_SLOT .. task)
    live_at_least(lock.key, math.max(ms, SLOTS_MS))
  end,
  unreserve = function(lock, task) return redis.call('ZREM', lock.key, KEPT_SLOT .. task) == 1 end,
}
