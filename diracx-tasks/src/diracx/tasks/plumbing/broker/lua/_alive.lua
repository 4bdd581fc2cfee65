-- Who lives. `$ALIVE` is a sorted set: worker -> when its lease ends (ms); `$LEASES`: worker -> how long its lease is
-- (ms); `$RENEWED`: when a lease was last renewed, or dead workers were looked for (ms); after a renewal also the shortest
-- lease (ms) and the dataset id, so that one command tells the next renewal whether anything has changed.

-- All workers renew at the pace of the shortest lease: each third of it. Where nobody was heard for this part of a
-- lease, its worker could not renew it, for the server was away.
local UNHEARD = 0.6
local RENEWED_MS = 86400000 -- longer than a server is away and comes back

-- The shortest lease of all (ms), or nil. Asked for once in a script.
local shortest_ms
local function shortest_lease()
  if not shortest_ms then shortest_ms = tonumber(redis.call('ZRANGE', '$LEASES', 0, 0, 'WITHSCORES')[2]) end
  return shortest_ms
end

-- The longest lease of all (ms), `lease_ms` among them.
local function longest_lease(lease_ms)
  return math.max(lease_ms, tonumber(redis.call('ZREVRANGE', '$LEASES', 0, 0, 'WITHSCORES')[2]) or 0)
end

-- Where the server was away, each worker that could not renew gets another term of its own length, but for those that
-- have signed off (0), and for the dead (below 0) that nobody waits for: see reclaim.lua. To be called before any lease
-- is judged. One whose length is unknown (it comes from an earlier release, or the list was lost) counts with the
-- longest that is known.
-- `known`: what a renewal leaves beside the moment, or nil. Returns whether nothing has changed since it was left.
local function note_contact(lease_ms, now, known)
  local now_ms = now / 1000
  local noted = int(now_ms) .. (known and ' ' .. known or '')
  local heard = redis.pcall('SET', '$RENEWED', noted, 'PX', RENEWED_MS, 'GET')
  if type(heard) == 'table' then redis.call('SET', '$RENEWED', noted, 'PX', RENEWED_MS) end -- of another type
  local rest
  heard, rest = string.match(type(heard) == 'string' and heard or '', '^(%d+) ?(.*)$')
  heard = tonumber(heard)
  if not heard then
    local newest = redis.call('ZREVRANGE', '$ALIVE', 0, 0, 'WITHSCORES')
    local length = newest[1] and redis.call('ZSCORE', '$LEASES', newest[1]) or lease_ms
    heard = newest[1] and tonumber(newest[2]) - tonumber(length) or now_ms
  end
  local unheard_ms = now_ms - heard
  if known and rest == known then shortest_ms = tonumber(string.match(known, '^%d+')) end
  if unheard_ms < UNHEARD * math.min(lease_ms, shortest_lease() or lease_ms) then return known and rest == known end
  local unknown = longest_lease(lease_ms)
  local listed = redis.call('ZRANGEBYSCORE', '$ALIVE', '-inf', '+inf', 'WITHSCORES')
  for at = 1, #listed, 2 do
    local known, ends = redis.call('ZSCORE', '$LEASES', listed[at]), tonumber(listed[at + 1])
    local length = tonumber(known or unknown)
    if unheard_ms >= UNHEARD * length and ends < now_ms + length and (ends > 0 or ends < 0 and known) then
      redis.call('ZADD', '$ALIVE', int(now_ms + length), listed[at])
    end
  end
end

-- The worker lives for another `lease_ms`. If that is the shortest lease of all, the others must hear of it: they are to
-- renew at its pace, and to look when it ends.
-- `known` as for note_contact: where that holds, the length of the lease is there. Returns whether it holds.
local function heartbeat(consumer, lease_ms, now, known)
  local unchanged = note_contact(lease_ms, now, known)
  if redis.call('ZADD', '$ALIVE', int(now / 1000 + lease_ms), consumer) == 0 and unchanged then return true end
  if unchanged then shortest_ms = nil end -- it was on no list: what others know does not count
  local shortest = shortest_lease()
  redis.call('ZADD', '$LEASES', int(lease_ms), consumer)
  shortest_ms = math.min(shortest or lease_ms, lease_ms)
  if shortest and lease_ms < shortest then redis.call('PUBLISH', '$LEASES', int(lease_ms)) end
end

-- A worker that asks for work lives, even before its keeper has had the time to say so: after a long pause it would
-- else count as dead, and what it is given now be taken over at once; and it would take those for dead that the server
-- could not hear either. `lease_ms` 0: it is no worker with a lease.
local function ensure_alive(consumer, lease_ms, now)
  local ends = tonumber(redis.call('ZSCORE', '$ALIVE', consumer) or 0)
  if lease_ms > 0 and ends <= now / 1000 + (1 - UNHEARD) * lease_ms then
    heartbeat(consumer, lease_ms, now)
  end
end
