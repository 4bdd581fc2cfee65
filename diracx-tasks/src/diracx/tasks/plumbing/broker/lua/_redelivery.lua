-- Counts the workers that were lost with a message. `$SURVIVED` is a set, "{stream} {entry} {deliveries}": deliveries
-- reclaimed from workers that came back later. It is usually empty.
local SURVIVED_MS = 86400000 -- longer than a live worker is silent

-- Notes that the worker of a delivery is alive, if another worker has the message now (`is_passed_on`: known to be so).
local function note_survivor(stream, entry, deliveries, is_passed_on)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1)
  if is_passed_on or not pending.err and pending[1] and tonumber(pending[1][4]) > deliveries then
    redis.call('SADD', '$SURVIVED', stream .. ' ' .. entry .. ' ' .. int(deliveries))
    redis.call('PEXPIRE', '$SURVIVED', SURVIVED_MS)
  end
end

local function survivals(stream, entry, deliveries)
  local found = 0
  if deliveries < 2 or redis.call('EXISTS', '$SURVIVED') == 0 then return found end
  for earlier = 1, deliveries - 1 do
    found = found + redis.call('SISMEMBER', '$SURVIVED', stream .. ' ' .. entry .. ' ' .. int(earlier))
  end
  return found
end

-- The entry for a redelivery, with a field `survived` if some of its earlier workers are alive.
local function with_survivals(stream, entry, deliveries)
  local found = survivals(stream, entry[1], deliveries)
  if found > 0 then
    entry[2][#entry[2] + 1], entry[2][#entry[2] + 2] = 'survived', int(found)
  end
  return entry
end

-- Number of workers lost with a message. `noted`: that of earlier entries, from the field `deaths`, or nil.
local function count_redeliveries(stream, entry, deliveries, noted)
  return deliveries - 1 - survivals(stream, entry, deliveries) + (tonumber(noted) or 0)
end

-- Adds the message to stream `to` as a new entry, with the redelivery count and the other fields of this one. A worker
-- that survived does not count, but may have started the task.
local function requeue(stream, entry, deliveries, fields, to, data, since)
  since = with_occurrence(since, field_of(fields, 'occurrence'))
  local redelivery_count = count_redeliveries(stream, entry, deliveries, field_of(fields, 'deaths'))
  local started = deliveries > 1 or field_of(fields, 'started')
  enqueue(to, data, since, redelivery_count, field_of(fields, 'woken'), started)
end
