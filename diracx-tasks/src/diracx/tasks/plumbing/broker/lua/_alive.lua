-- Who lives. `$ALIVE` is a sorted set: worker -> when its lease ends (ms).

-- Every worker renews its lease when two thirds of it are left. With less than this part left of the newest one, it was
-- the server that was away, and nobody could renew.
local RENEWED_LATE = 0.4

-- The worker lives for another `lease_ms`. Where the server was away, all get another term, but for those that have
-- signed off (0).
local function heartbeat(consumer, lease_ms, now)
  local newest = redis.call('ZREVRANGE', '$ALIVE', 0, 0, 'WITHSCORES')[2]
  local ends = int(now / 1000 + lease_ms)
  if newest and tonumber(newest) <= now / 1000 + RENEWED_LATE * lease_ms then
    local ended = redis.call('ZRANGEBYSCORE', '$ALIVE', '(0', '+inf')
    for from = 1, #ended, 1000 do
      local renewed = {}
      for at = from, math.min(from + 999, #ended) do
        renewed[#renewed + 1] = ends
        renewed[#renewed + 1] = ended[at]
      end
      redis.call('ZADD', '$ALIVE', unpack(renewed))
    end
  end
  redis.call('ZADD', '$ALIVE', ends, consumer)
end

-- A worker that asks for work lives, even before its keeper has had the time to say so: after a long pause it would
-- else count as dead, and what it is given now be taken over at once; and it would take those for dead that the server
-- could not hear either. `lease_ms` 0: it is no worker with a lease.
local function sign_on(consumer, lease_ms, now)
  local ends = tonumber(redis.call('ZSCORE', '$ALIVE', consumer) or 0)
  if lease_ms > 0 and ends <= now / 1000 + RENEWED_LATE * lease_ms then
    heartbeat(consumer, lease_ms, now)
  end
end
