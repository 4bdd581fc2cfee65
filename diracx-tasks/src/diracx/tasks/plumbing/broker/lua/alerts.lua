-- Stores the alerts that health checks have found, with the time of the first notice of each.
-- KEYS: none. ARGV: the health checks that were made (msgpack list), their alerts (msgpack list of `{check}
-- {subject}`).
-- Returns the time of the first notice of each alert (ms). An alert without a notice for a quarter of an hour starts
-- again. Alerts of other checks, which other processes make, do not change.
-- #flags allow-oom
-- #include _time
local FORGOTTEN_MS, KEPT_MS = 900000, 86400000
local now_ms, made, found, current = math.floor(now_us() / 1000), {}, {}, {}
for _, check in ipairs(cmsgpack.unpack(ARGV[1])) do made[check] = true end
for position, alert in ipairs(cmsgpack.unpack(ARGV[2])) do
  local since, last = string.match(redis.call('HGET', '$ALERTS', alert) or '', '^(%d+) (%d+)$')
  if not since or now_ms - tonumber(last) > FORGOTTEN_MS then since = int(now_ms) end
  redis.call('HSET', '$ALERTS', alert, since .. ' ' .. int(now_ms))
  redis.call('PEXPIRE', '$ALERTS', KEPT_MS)
  found[position], current[alert] = tonumber(since), true
end
for _, alert in ipairs(redis.call('HKEYS', '$ALERTS')) do
  if not current[alert] and made[string.match(alert, '^%S+')] then redis.call('HDEL', '$ALERTS', alert) end
end
return found
