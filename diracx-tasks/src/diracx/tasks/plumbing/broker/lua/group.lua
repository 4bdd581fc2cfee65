-- Adds children to a callback group; with the last of them the group is complete and they are submitted.
-- KEYS: none. ARGV: group id, fields of the group (msgpack table; only with the first children, else ''),
--   children (msgpack list of {task, staged = "{stream}\n{message}"}), 1 when these are the last.
-- Returns 1 when the callback was submitted at once (a group without children); -1 when the group does not exist any
-- more; 2 when complete groups have children that promote.lua still has to move; else 0. No child runs before the group
-- is complete; a group whose submitter stops before that expires soon.
-- #include _time _lines _queue _groups
local SUBMITTING_MS = 600000
local group, children, last = ARGV[1], cmsgpack.unpack(ARGV[3]), ARGV[4] == '1'
local key, first = '$GROUPS_PREFIX' .. ARGV[1], ARGV[2] ~= ''
if first then
  for field, value in pairs(cmsgpack.unpack(ARGV[2])) do redis.call('HSET', key, field, value) end
  redis.call('HSET', key, 'created', int(now_us() / 1000), 'submitting', 1)
elseif redis.call('HEXISTS', key, 'submitting') == 0 then
  return -1
end
local ordered = redis.call('HEXISTS', key, 'results') == 1
for _, child in ipairs(children) do
  redis.call('SADD', key .. ':pending', child.task)
  redis.call('RPUSH', key .. ':staged', child.staged)
  if ordered then redis.call('RPUSH', key .. ':children', child.task) end
end
if not last then
  remember(group, SUBMITTING_MS)
  return 0
end
redis.call('HDEL', key, 'submitting')
if redis.call('EXISTS', key .. ':pending') == 0 then return fire(group, false) end
remember(group, living_ms(redis.call('HGET', key, 'ttl_ms')))
redis.call('RPUSH', '$GROUP_OUTBOX', group)
-- A group submitted in one call needs no second step, if no other group is before it.
if first then release_staged(#children, math.huge) end
return redis.call('EXISTS', '$GROUP_OUTBOX') * 2
