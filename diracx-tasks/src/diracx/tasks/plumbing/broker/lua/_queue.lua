-- Where a message can be: in a stream, or in the delayed set. These are the only ways between them.

local function is_pending(stream, consumer, entry, deliveries)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
  return not pending.err and pending[1] ~= nil and tonumber(pending[1][4]) == deliveries
end

-- Of some entries of a stream, what is pending with this worker: entry -> deliveries.
-- One question for all that lie side by side, as those of a batch do; one for each of the others.
local function pending_of(consumer, stream, entries)
  local found, first, last = {}, entries[1], entries[1]
  for _, entry in ipairs(entries) do
    if entry < first then first = entry elseif entry > last then last = entry end
  end
  if #entries > 2 then
    local pending = redis.pcall('XPENDING', stream, '$GROUP', first, last, 10000, consumer)
    for _, p in ipairs(pending.err and {} or pending) do found[p[1]] = tonumber(p[4]) end
  end
  for _, entry in ipairs(entries) do
    if not found[entry] then
      local p = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
      if not p.err and p[1] then found[entry] = tonumber(p[1][4]) end
    end
  end
  return found
end

-- The same of a list in which each message has `step` places, of which the first two are its stream and its entry:
-- stream -> entry -> deliveries.
local function all_pending_of(consumer, list, step)
  local by_stream, found = {}, {}
  for at = 1, #list, step do
    local entries = by_stream[list[at]]
    if not entries then
      entries = {}
      by_stream[list[at]] = entries
    end
    entries[#entries + 1] = list[at + 1]
  end
  for stream, entries in pairs(by_stream) do found[stream] = pending_of(consumer, stream, entries) end
  return found
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

-- `deaths`: how many workers have died with it under earlier entries. The delivery count of an entry ends with it.
-- `woken`: the key of the lock that was handed to it, if one was.
local function enqueue(stream, data, since, deaths, woken)
  local fields = {'data', data}
  if since and since ~= '0' then fields[3], fields[4] = 'since', since end
  if deaths and tonumber(deaths) > 0 then
    fields[#fields + 1] = 'deaths'
    fields[#fields + 1] = deaths
  end
  if woken then
    fields[#fields + 1] = 'woken'
    fields[#fields + 1] = woken
  end
  return redis.call('XADD', stream, '*', unpack(fields))
end

-- How many are in the delayed set for each reason, for those who look.
local function count_reason(reason, change)
  if redis.call('HINCRBY', '$DELAYED_REASONS', reason, change) <= 0 then
    redis.call('HDEL', '$DELAYED_REASONS', reason)
  end
end

-- Take the message of a delayed task away: stream, reason, since, deaths, message; nothing when it is not there.
local function take_delayed(task)
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  redis.call('ZREM', '$DELAYED', task)
  if not stored then return nil end
  redis.call('HDEL', '$DELAYED_DATA', task)
  local header_end = string.find(stored, '\n', 1, true)
  local stream, reason, since, deaths =
    string.match(string.sub(stored, 1, header_end - 1), '^(%S+) (%S+) (%S+) ?(%d*)')
  count_reason(reason, -1)
  return stream, reason, since, tonumber(deaths), string.sub(stored, header_end + 1)
end

-- Into the delayed set. The message itself is never looked into, here or when it comes back.
-- `lock`: the key of the lock that refused it, if one did; only those who look want to know.
local function delay(task, due_ms, stream, reason, since, data, deaths, lock)
  local header = stream .. ' ' .. reason .. ' ' .. since
  if lock or (deaths and deaths > 0) then header = header .. ' ' .. (deaths or 0) end
  if lock then header = header .. ' ' .. string.gsub(lock, '\n', ' ') end
  take_delayed(task)
  if redis.call('EXISTS', '$DELAYED_DATA') == 0 then redis.call('DEL', '$DELAYED_REASONS') end
  count_reason(reason, 1)
  redis.call('HSET', '$DELAYED_DATA', task, header .. '\n' .. data)
  redis.call('ZADD', '$DELAYED', string.format('%.3f', due_ms), task)
  if redis.call('ZRANGE', '$DELAYED', 0, 0)[1] == task then
    -- Who may not publish, is heard within the next look. What no scheduler hears, the workers do themselves.
    if redis.pcall('PUBLISH', '$WAKE_SCHEDULER', 'delayed') == 0 then
      redis.pcall('PUBLISH', '$WAKE_WORKERS', int(math.max(0, math.ceil(due_ms - now_us() / 1000))))
    end
  end
end

-- Is it parked behind a lock, and not put aside for another reason? Who has left a line by its timer may still
-- be found in it, and must not be woken from its retry.
local function waits_for_a_lock(task)
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  return stored and string.match(stored, '^%S+ (%S+) ') == 'lock'
end

-- Out of the delayed set, into its stream; `woken` is the key of the lock that was handed to it, if one was.
-- False when the task is no longer there.
local function undelay(task, woken)
  local stream, _, since, deaths, data = take_delayed(task)
  if not stream then return false end
  enqueue(stream, data, since, deaths, woken)
  return true
end
