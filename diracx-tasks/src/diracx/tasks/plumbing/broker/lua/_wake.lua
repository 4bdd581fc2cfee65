-- Hand a lock that can be had to whoever waits for it: first come, first served within a priority.
-- Waiters are "{kind of lock}:{task}". Readers that wait side by side are woken together.
local TURN_MS = 1000

local function can_be_had(kind, lock)
  if kind == 'shared' then return redis.call('HEXISTS', lock.key, 'writer') == 0 end
  if kind == 'concurrency' then
    redis.call('ZREMRANGEBYSCORE', lock.key, '-inf', int(now_us()))
    return not lock.limit or redis.call('ZCARD', lock.key) < lock.limit
  end
  return redis.call('EXISTS', lock.key) == 0
end

local function wake(lock)
  if lock.kind == 'rate' then return end -- its waiters know when their quota returns
  local waiting, turn, readers_woken = '$WAITING_PREFIX' .. lock.key, '$TURN_PREFIX' .. lock.key, false
  while true do
    local first = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
    local head = first[1]
    if not head or redis.call('EXISTS', turn) == 1 then return end
    local kind, task = string.match(head, '^(%a+):(.*)$')
    if not can_be_had(kind, lock) or (kind == 'exclusive' and readers_woken) then return end
    redis.call('ZREM', waiting, head)
    if waits_for_a_lock(task) and undelay(task, lock.key) then
      if kind == 'mutex' or kind == 'exclusive' then
        redis.call('SET', turn, int(tonumber(first[2])) .. ':' .. task, 'PX', TURN_MS)
      end
      if kind ~= 'shared' then return end
      readers_woken = true
    end
  end
end

-- Give locks back and wake those who wait for them. Returns how many were still held.
local function release_all(locks)
  local released = 0
  for _, lock in ipairs(locks) do
    -- Where a key is not of the type that it should be, there is no lock of ours, and the others are given back.
    local kind = kinds[lock.kind]
    local looked, held = pcall(kind and kind.release, lock)
    if looked and held then
      released = released + 1
      pcall(wake, lock) -- else whoever waits looks again by its timer
    end
  end
  return released
end

-- A task that was refused by one of its locks may have been woken for another: the next in line must not
-- wait for it.
local function pass_on(locks, refusing, task)
  for position, lock in ipairs(locks) do
    if turn_of(lock) == task then redis.call('DEL', '$TURN_PREFIX' .. lock.key) end
    if position ~= refusing then wake(lock) end
  end
end

-- A task that was woken for a lock is gone from the queue without having asked for it: the next one, please.
local function hand_on(key, task)
  local lock = {key = key}
  if turn_of(lock) == task then redis.call('DEL', '$TURN_PREFIX' .. key) end
  wake(lock)
end
