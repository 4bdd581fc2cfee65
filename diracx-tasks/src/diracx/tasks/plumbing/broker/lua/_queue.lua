-- Where a message can be: in a stream, or in the delayed set. These are the only ways between them.

local function is_pending(stream, consumer, entry, deliveries)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
  return not pending.err and pending[1] ~= nil and tonumber(pending[1][4]) == deliveries
end

-- The field in a worker's ledger for an entry that it runs and that the server has lost: see renew.lua.
local function orphan(stream, entry)
  return 'entry:' .. stream .. ' ' .. entry
end

-- Is the entry still ours, delivered as often as we believe? This fences off late settlements.
local function owns(stream, consumer, entry, deliveries)
  return is_pending(stream, consumer, entry, deliveries)
    or redis.call('HEXISTS', '$HELD_PREFIX' .. consumer, orphan(stream, entry)) == 1
end

local function remove(stream, entry)
  redis.call('XACK', stream, '$GROUP', entry)
  redis.call('XDEL', stream, entry)
end

local function enqueue(stream, data, since)
  if since and since ~= '0' then
    return redis.call('XADD', stream, '*', 'data', data, 'since', since)
  end
  return redis.call('XADD', stream, '*', 'data', data)
end

-- Into the delayed set. The message itself is never looked into, here or when it comes back.
local function delay(task, due_ms, stream, reason, since, data)
  redis.call('HSET', '$DELAYED_DATA', task, stream .. ' ' .. reason .. ' ' .. since .. '\n' .. data)
  redis.call('ZADD', '$DELAYED', string.format('%.3f', due_ms), task)
  if redis.call('ZRANGE', '$DELAYED', 0, 0)[1] == task then
    redis.call('RPUSH', '$WAKE_SCHEDULER', 1)
    redis.call('LTRIM', '$WAKE_SCHEDULER', -1, -1)
    redis.call('PEXPIRE', '$WAKE_SCHEDULER', 10000)
  end
end

-- Out of the delayed set, into its stream. False when the task is no longer there.
local function undelay(task)
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  redis.call('ZREM', '$DELAYED', task)
  if not stored then return false end
  redis.call('HDEL', '$DELAYED_DATA', task)
  local header_end = string.find(stored, '\n', 1, true)
  local stream, _, since = string.match(string.sub(stored, 1, header_end - 1), '^(%S+) (%S+) (%S+)$')
  enqueue(stream, string.sub(stored, header_end + 1), since)
  return true
end
