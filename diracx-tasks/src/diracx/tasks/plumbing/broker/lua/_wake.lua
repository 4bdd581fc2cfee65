-- Hand a lock that was just given back to whoever waits for it: first come, first served within a
-- priority. Waiters are "{kind of lock}:{task}". Readers that wait side by side are woken together.
local TURN_MS = 1000

local function wake(lock)
  local waiting, readers_woken = '$WAITING_PREFIX' .. lock.key, false
  while true do
    local head = redis.call('ZRANGE', waiting, 0, 0)[1]
    if not head then return end
    local kind, task = string.match(head, '^(%a+):(.*)$')
    if kind == 'exclusive' and (readers_woken or redis.call('EXISTS', lock.key) == 1) then return end
    redis.call('ZREM', waiting, head)
    if undelay(task, lock.key) then
      if kind == 'mutex' or kind == 'exclusive' then
        redis.call('SET', '$TURN_PREFIX' .. lock.key, task, 'PX', TURN_MS)
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
    if kinds[lock.kind].release(lock) then
      released = released + 1
      wake(lock)
    end
  end
  return released
end

-- A task that was woken for one lock and is refused by another must not keep the first from the next in line.
local function pass_turn_on(locks, refusing, task)
  for position, lock in ipairs(locks) do
    local turn = '$TURN_PREFIX' .. lock.key
    if redis.call('GET', turn) == task then
      redis.call('DEL', turn)
      if position ~= refusing then wake(lock) end
    end
  end
end

-- A task that was woken for a lock is gone from the queue without having asked for it: the next one, please.
local function hand_on(key, task)
  local turn = '$TURN_PREFIX' .. key
  if redis.call('GET', turn) == task then redis.call('DEL', turn) end
  wake({key = key})
end
