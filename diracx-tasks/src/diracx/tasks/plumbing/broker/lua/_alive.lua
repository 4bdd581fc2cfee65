-- Leases of workers. `$ALIVE` is a sorted set: worker -> end of its lease (ms); `$LEASES`: worker -> length of its
-- lease (ms); `$RENEWED`: time of the last renewal, or of the last search for dead workers (ms); after a renewal also
-- the shortest lease (ms) and the dataset id, so that the next renewal detects a change with one command.

-- All workers renew at a third of the shortest lease. If no worker has renewed for this fraction of a lease, the
-- server was unavailable, and its worker could not renew it.
local OUTAGE_FRACTION = 0.6
local RENEWED_MS = 86400000 -- longer than an outage of the server

-- The shortest lease of all (ms), or nil. Read once per script.
local shortest_ms
local function shortest_lease()
  if not shortest_ms then shortest_ms = tonumber(redis.call('ZRANGE', '$LEASES', 0, 0, 'WITHSCORES')[2]) end
  return shortest_ms
end

-- The longest lease of all (ms), including `lease_ms`.
local function longest_lease(lease_ms)
  return math.max(lease_ms, tonumber(redis.call('ZREVRANGE', '$LEASES', 0, 0, 'WITHSCORES')[2]) or 0)
end

-- After an outage of the server, extends the lease of each worker that could not renew by its full length, except for
-- stopped workers (score 0), and dead ones (below 0) whose lease is unknown: see reclaim.lua. Call it before any lease
-- is checked. A lease of unknown length (of an earlier release, or after a loss of the list) counts as the longest
-- known one.
-- `known`: the shortest lease and the dataset id that the renewal expects, or nil. Returns true if they are unchanged.
local function note_contact(lease_ms, now, known)
  local now_ms = now / 1000
  local noted = int(now_ms) .. (known and ' ' .. known or '')
  local renewed_ms = redis.pcall('SET', '$RENEWED', noted, 'PX', RENEWED_MS, 'GET')
  if type(renewed_ms) == 'table' then redis.call('SET', '$RENEWED', noted, 'PX', RENEWED_MS) end -- a key of the wrong type
  local rest
  renewed_ms, rest = string.match(type(renewed_ms) == 'string' and renewed_ms or '', '^(%d+) ?(.*)$')
  renewed_ms = tonumber(renewed_ms)
  if not renewed_ms then
    local newest = redis.call('ZREVRANGE', '$ALIVE', 0, 0, 'WITHSCORES')
    local length = newest[1] and redis.call('ZSCORE', '$LEASES', newest[1]) or lease_ms
    renewed_ms = newest[1] and tonumber(newest[2]) - tonumber(length) or now_ms
  end
  local silent_ms = now_ms - renewed_ms
  if known and rest == known then shortest_ms = tonumber(string.match(known, '^%d+')) end
  if silent_ms < OUTAGE_FRACTION * math.min(lease_ms, shortest_lease() or lease_ms) then return known and rest == known end
  local unknown = longest_lease(lease_ms)
  local listed = redis.call('ZRANGEBYSCORE', '$ALIVE', '-inf', '+inf', 'WITHSCORES')
  for at = 1, #listed, 2 do
    local known, ends = redis.call('ZSCORE', '$LEASES', listed[at]), tonumber(listed[at + 1])
    local length = tonumber(known or unknown)
    if silent_ms >= OUTAGE_FRACTION * length and ends < now_ms + length and (ends > 0 or ends < 0 and known) then
      redis.call('ZADD', '$ALIVE', int(now_ms + length), listed[at])
    end
  end
end

-- Renews a worker's lease for `lease_ms`. A lease shorter than all others is announced: the other workers must renew at
-- its pace, and poll when it ends.
-- `known` as for note_contact. Returns true if it is unchanged; the length of the lease is stored then.
local function heartbeat(consumer, lease_ms, now, known)
  local unchanged = note_contact(lease_ms, now, known)
  if redis.call('ZADD', '$ALIVE', int(now / 1000 + lease_ms), consumer) == 0 and unchanged then return true end
  if unchanged then shortest_ms = nil end -- a new member: the cached shortest lease does not include it
  local shortest = shortest_lease()
  redis.call('ZADD', '$LEASES', int(lease_ms), consumer)
  shortest_ms = math.min(shortest or lease_ms, lease_ms)
  if shortest and lease_ms < shortest then redis.call('PUBLISH', '$LEASES', int(lease_ms)) end
end

-- Renews the lease of a worker that fetches, if it ends soon: after a long pause, before its keeper renews, the worker
-- would count as dead and its new deliveries would be reclaimed at once; and it would declare other workers dead that
-- could not reach the server either. `lease_ms` 0: the caller has no lease.
local function ensure_alive(consumer, lease_ms, now)
  local ends = tonumber(redis.call('ZSCORE', '$ALIVE', consumer) or 0)
  if lease_ms > 0 and ends <= now / 1000 + (1 - OUTAGE_FRACTION) * lease_ms then
    heartbeat(consumer, lease_ms, now)
  end
end
