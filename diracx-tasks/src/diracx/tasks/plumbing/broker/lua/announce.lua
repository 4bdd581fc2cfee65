-- Publishes the configuration with which a process runs, or the end of the process.
-- KEYS: none. ARGV: process, its configuration or '' at its end, time for which an entry is valid (ms), 1 to remove
--   expired entries of other processes, else 0.
-- Returns nothing. The key expires after twice that time without a call with 1.
-- #flags allow-oom
-- #include _time
local now_ms, new = math.floor(now_us() / 1000), 0
if ARGV[2] == '' then
  redis.call('HDEL', '$CONFIG_IN_FORCE', ARGV[1])
else
  new = redis.call('HSET', '$CONFIG_IN_FORCE', ARGV[1], int(now_ms) .. ' ' .. ARGV[2])
end
if ARGV[4] == '1' then
  -- A random sample, so that the call is short for any number of processes; all of them call this now and then.
  local entries = redis.call('HRANDFIELD', '$CONFIG_IN_FORCE', 200, 'WITHVALUES')
  for field = 1, #entries, 2 do
    local seen = tonumber(string.match(entries[field + 1], '^(%d+) ') or 0)
    if seen < now_ms - tonumber(ARGV[3]) then redis.call('HDEL', '$CONFIG_IN_FORCE', entries[field]) end
  end
end
if new == 1 or ARGV[4] == '1' then redis.call('PEXPIRE', '$CONFIG_IN_FORCE', 2 * tonumber(ARGV[3])) end
