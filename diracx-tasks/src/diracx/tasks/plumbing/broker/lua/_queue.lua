-- Where a message can be: in a stream, or in the delayed set. These are the only ways between them.

-- Is the entry still ours, delivered as often as we believe? This fences off late settlements.
local function owns(stream, consumer, entry, deliveries)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
  return not pending.err and pending[1] ~= nil and tonumber(pending[1][4]) == deliveries
end

local function remove(stream, entry)
  redis.call('XACK', stream, '$GROUP', entry)
  redis.call('XDEL', stream, entry)
end

local function enqueue(stream, data, since, woken)
  if woken then
    return redis.call('XADD', stream, '*', 'data', data, 'since', since, 'woken', woken)
  end
  if since and since ~= '0' then
    return redis.call('XADD', stream, '*', 'data', data, 'since', since)
  end
  return redis.call('XADD', stream, '*', 'data', data)
end

-- Into the delayed set. The message itself is never looked into, here or when it comes back.
local function delay(task, due_ms, stream, reason, since, data)
  redis.call('HSET', '$DELAYED_DATA', task, stream .. ' ' .. reason .. ' ' .. since .. '\n' .. data)
  redis.call('ZADD', '$DELAYED', int(due_ms), task)
  if redis.call('ZRANGE', '$DELAYED', 0, 0)[1] == task then
    redis.call('RPUSH', '$WAKE_SCHEDULER', 1)
    redis.call('LTRIM', '$WAKE_SCHEDULER', -1, -1)
    redis.call('PEXPIRE', '$WAKE_SCHEDULER', 10000)
  end
end

-- Out of the delayed set, into its stream; `woken` is the key of the lock that was handed to it, if one was.
-- False when the task is no longer there.
local function undelay(task, woken)
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  redis.call('ZREM', '$DELAYED', task)
  if not stored then return false end
  redis.call('HDEL', '$DELAYED_DATA', task)
  local header_end = string.find(stored, '\n', 1, true)
  local stream, _, since = string.match(string.sub(stored, 1, header_end - 1), '^(%S+) (%S+) (%S+)$')
  enqueue(stream, string.sub(stored, header_end + 1), since, woken)
  return true
end
