-- Callback groups. `diracx:groups:{id}` is a hash (total, ttl_ms, created, callback, callback_stream, … and
-- the same for `failure`); beside it `:pending`, the set of children that have not ended, `:failed`, those that
-- have failed and why, and where a callback asks for them `:children` (in their order) and `:results`.
-- A set, not a counter: a child that ends twice is subtracted once.
local LIVING_MS = 604800000 -- 7 days: no queue is longer than that, and nothing stays for ever
local LONGEST_MS = 315576000000 -- ten years

-- The group and all that belongs to it live for another `ms`.
local function remember(group, ms)
  local key, now_ms = '$GROUPS_PREFIX' .. group, now_us() / 1000
  for _, part in ipairs({'', ':pending', ':failed', ':children', ':results', ':staged'}) do
    redis.call('PEXPIRE', key .. part, int(ms))
  end
  redis.call('ZADD', '$GROUPS', int(now_ms + ms), group)
  trim('$GROUPS', int(now_ms))
  if redis.call('PTTL', '$GROUPS') < ms then redis.call('PEXPIRE', '$GROUPS', int(ms)) end
end

-- A group that has not ended lives as long as its children may take, whatever its own time to live.
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

-- Submit the callback, or what was given for the case of failure; the group ends with that. Returns 1, or 0
-- when there is nothing to fire: it has fired, is not complete yet, or has failed and nothing was given for
-- that (then it stays to be seen). `forced`: the callback then, all the same.
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

-- A child has ended permanently. `g` has id, child, and if there is one its error (in a line) and its result.
-- Without a child it is a sign of life only. A failed child that succeeds after all (it was run again from the
-- dead letters) mends its group.
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

-- The children of a large group wait in `:staged` until all are in; then anybody moves them into their streams,
-- a part at a time, of so many bytes (but for what is larger alone). Returns how many were moved, and what is left of
-- the bytes.
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
