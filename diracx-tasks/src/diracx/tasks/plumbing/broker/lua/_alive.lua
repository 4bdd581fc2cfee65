-- Who lives. `$ALIVE` is a sorted set: worker -> when its lease ends (ms).

-- A worker that asks for work lives, even before its keeper has had the time to say so: after a long pause it would
-- else count as dead, and what it is given now be taken over at once. `lease_ms` 0: it is no worker with a lease.
local function sign_on(consumer, lease_ms, now)
  if lease_ms > 0 and tonumber(redis.call('ZSCORE', '$ALIVE', consumer) or 0) <= now / 1000 then
    redis.call('ZADD', '$ALIVE', int(now / 1000 + lease_ms), consumer)
  end
end
