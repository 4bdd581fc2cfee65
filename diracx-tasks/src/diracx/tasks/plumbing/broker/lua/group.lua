-- Create a callback group and submit its children, in one step.
-- KEYS: none. ARGV: group id, fields of the group (msgpack table), time to live (ms),
--   children (msgpack list of {task, stream, data}).
-- Returns 1 when the callback was fired at once (a group without children), else 0.
-- #include _time _queue _groups
local key = '$GROUPS_PREFIX' .. ARGV[1]
for field, value in pairs(cmsgpack.unpack(ARGV[2])) do redis.call('HSET', key, field, value) end
redis.call('HSET', key, 'ttl_ms', ARGV[3])
redis.call('PEXPIRE', key, ARGV[3])
local children = cmsgpack.unpack(ARGV[4])
if #children == 0 then return fire(ARGV[1]) end
for _, child in ipairs(children) do
  redis.call('SADD', key .. ':pending', child.task)
  enqueue(child.stream, child.data)
end
redis.call('PEXPIRE', key .. ':pending', ARGV[3])
return 0
