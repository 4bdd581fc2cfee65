-- Say with which configuration a process runs, or (with nothing to say) that it runs no more.
-- KEYS: none. ARGV: process, what it says or '', how long an entry counts (ms), whether to remove those of
--   processes that have been silent for longer (1 or 0).
-- Returns nothing. The key outlives the last process that removed the silent by twice that time.
-- #flags allow-oom
-- #include _time
local now_ms, new = math.floor(now_us() / 1000), 0
if ARGV[2] == '' then
  redis.call('HDEL', '$CONFIG_IN_FORCE', ARGV[1])
else
  new = redis.call('HSET', '$CONFIG_IN_FORCE', ARGV[1], int(now_ms) .. ' ' .. ARGV[2])
end
if ARGV[4] == '1' then
  -- Some of them, by chance: all do this now and then, and nobody is held up by how many there are.
  local entries = redis.call('HRANDFIELD', '$CONFIG_IN_FORCE', 200, 'WITHVALUES')
  for field = 1, #entries, 2 do
    local seen = tonumber(string.match(entries[field + 1], '^(%d+) ') or 0)
    if seen < now_ms - tonumber(ARGV[3]) then redis.call('HDEL', '$CONFIG_IN_FORCE', entries[field]) end
  end
end
if new == 1 or ARGV[4] == '1' then redis.call('PEXPIRE', '$CONFIG_IN_FORCE', 2 * tonumber(ARGV[3])) end
