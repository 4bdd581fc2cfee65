-- Hand a lock that was just given back to whoever waits for it: first come, first served within a
-- priority. Waiters are "{kind of lock}:{task}". Readers that wait side by side are woken together.
local TURN_MS = 1000

local function wake(lock)
  local waiting, readers_woken = '$WAITING_PREFIX' .. lock.key, false
  while true do
    local first = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
    local head = first[1]
    if not head then return end
    local kind, task = string.match(head, '^(%a+):(.*)$')
    if kind == 'exclusive' and (readers_woken or redis.call('EXISTS', lock.key) == 1) then return end
    redis.call('ZREM', waiting, head)
    if waits_for_a_lock(task) and undelay(task) then
      if kind == 'mutex' or kind == 'exclusive' then
        redis.call('SET', '$TURN_PREFIX' .. lock.key, int(tonumber(first[2])) .. ':' .. task, 'PX', TURN_MS)
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
    if turn_of(lock) == task then
      redis.call('DEL', '$TURN_PREFIX' .. lock.key)
      if position ~= refusing then wake(lock) end
    end
  end
end
