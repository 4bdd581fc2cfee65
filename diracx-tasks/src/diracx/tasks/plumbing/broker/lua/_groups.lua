-- Callback groups. `diracx:groups:{id}` is a hash (total, ttl_ms, created, callback, callback_stream, … and
-- the same for `failure`). Further keys: `:pending`, the set of children that have not ended; `:failed`, the failed
-- ones with their errors; and, if a callback needs the results, `:children` (in their order) and `:results`.
-- A set, not a counter: a child that ends twice is counted once.
local LIVING_MS = 604800000 -- 7 days: longer than tasks wait in a queue
local LONGEST_MS = 315576000000 -- ten years

-- Sets the time to live of all keys of a group to `ms`.
local function remember(group, ms)
  local key, now_ms = '$GROUPS_PREFIX' .. group, now_us() / 1000
  for _, part in ipairs({'', ':pending', ':failed', ':children', ':results', ':staged'}) do
    redis.call('PEXPIRE', key .. part, int(ms))
  end
  redis.call('ZADD', '$GROUPS', int(now_ms + ms), group)
  trim('$GROUPS', int(now_ms))
  if redis.call('PTTL', '$GROUPS') < ms then redis.call('PEXPIRE', '$GROUPS', int(ms)) end
end

-- Time to live of a group that has not ended: at least `LIVING_MS`, for its children may wait for long.
local function living_ms(ttl_ms)
  return math.min(math.max(tonumber(ttl_ms) or 0, LIVING_MS), LONGEST_MS)
end

local function keep_alive(group, ttl_ms)
  local ms = living_ms(ttl_ms)
  if redis.call('PTTL', '$GROUPS_PREFIX' .. group) < ms - ms / 10 then remember(group, ms) end
end

local function forget_results(group)
  local key = '$GROUPS_PREFIX' .. group
  redis.call('UNLINK', key .. ':children', key .. ':results')
end

-- Submits the callback, or the failure callback, and deletes the group. Returns 1, or 0 without a submission: the group
-- has called back, is not submitted completely, or has failed without a failure callback (it is kept for inspection).
-- `forced`: submit the callback of a failed group without a failure callback.
local function fire(group, forced)
  local key = '$GROUPS_PREFIX' .. group
  if redis.call('HEXISTS', key, 'submitting') == 1 then return 0 end
  local failed = redis.call('EXISTS', key .. ':failed') == 1
  local which = failed and redis.call('HEXISTS', key, 'failure') == 1 and 'failure' or 'callback'
  local stored = redis.call('HMGET', key, which .. '_stream', which, which .. '_results', 'ttl_ms')
  if not stored[1] then return 0 end
  if failed and which == 'callback' and not forced then
    remember(group, math.min(tonumber(stored[4]) or LIVING_MS, LONGEST_MS))
    return 0
  end
  if not (is_stream(stored[1]) and stored[2] and pcall(enqueue, stored[1], stored[2])) then
    to_dead_letters(group, stored[2] or '')
  end
  redis.call('UNLINK', key, key .. ':pending', key .. ':failed')
  redis.call('ZREM', '$GROUPS', group)
  if stored[3] then
    for _, part in ipairs({':children', ':results'}) do
      redis.call('PEXPIRE', key .. part, int(living_ms(stored[4])))
    end
  else
    forget_results(group)
  end
  return 1
end

-- Records the permanent end of a child. `g` has id, child and, if present, error (one line) and result. Without a child
-- it only extends the group's time to live. A failed child that succeeds later (its dead letter was resubmitted) no
-- longer counts as failed.
local function child_done(g)
  local key = '$GROUPS_PREFIX' .. g.id
  local ttl_ms = redis.call('HGET', key, 'ttl_ms')
  if not ttl_ms then return published_child_done(g) end -- _published_groups.lua
  if g.child then
    local news = redis.call('SREM', key .. ':pending', g.child) == 1
    if not news and not g.error then news = redis.call('HDEL', key .. ':failed', g.child) == 1 end
    if not news then return end
    local living = int(living_ms(ttl_ms))
    if g.error then
      redis.call('HSET', key .. ':failed', g.child, g.error)
      redis.call('PEXPIRE', key .. ':failed', living)
    end
    if g.result then
      redis.call('HSET', key .. ':results', g.child, g.result)
      redis.call('PEXPIRE', key .. ':results', living)
    end
    if redis.call('EXISTS', key .. ':pending') == 0 then return fire(g.id, false) end
  end
  keep_alive(g.id, ttl_ms)
end

-- Moves children of complete groups from `:staged` into their streams, up to a number of children and of bytes (one
-- larger message is allowed). Returns how many were moved, and the bytes left.
local function release_staged(at_most, bytes_left)
  local moved = 0
  while moved < at_most and bytes_left > 0 do
    local group = redis.call('LINDEX', '$GROUP_OUTBOX', 0)
    if not group then break end
    local child = redis.pcall('LPOP', '$GROUPS_PREFIX' .. group .. ':staged')
    if type(child) ~= 'string' then
      redis.call('LPOP', '$GROUP_OUTBOX')
    else
      local stream, data = head_of(child)
      if not (is_stream(stream) and pcall(enqueue, stream, data)) then to_dead_letters(group, child) end
      moved, bytes_left = moved + 1, bytes_left - #child
    end
  end
  return moved, bytes_left
end
