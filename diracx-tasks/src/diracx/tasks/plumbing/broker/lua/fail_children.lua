-- Fails children of a group that the server has lost: the last of them ends the group.
-- KEYS: none. ARGV: group id, error, child ids.
-- Returns how many of them were pending.
-- #flags allow-oom
-- #include _time _lines _queue _published_groups _groups
local failed = 0
for position = 3, #ARGV do
  local child = ARGV[position]
  if redis.call('HEXISTS', '$DELAYED_DATA', child) == 0
    and redis.call('SISMEMBER', '$GROUPS_PREFIX' .. ARGV[1] .. ':pending', child) == 1 then
    failed = failed + 1
    child_done({id = ARGV[1], child = child, error = ARGV[2]})
  end
end
return failed
