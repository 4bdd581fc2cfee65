-- The end of executions. For each: remove the entry, give the locks back (waking whoever waits), and do the
-- one thing that follows. A delivery that is no longer ours changes nothing but the locks we still hold.
-- KEYS: none. ARGV: consumer, epoch as the worker knows it (or ''), settlements (msgpack list of {stream, entry, deliveries, locks} with any of
--   result  = {key, value, ttl_ms}
--   retry   = {task, due, stream, data}         put aside until due (ms since the epoch)
--   requeue = {stream, data, since}             handed back, to start elsewhere at once
--   group   = {id, child, failed}               one child less to wait for
--   dead    = {reason, data}                    kept until a worker with a database takes it).
-- Returns a list of 1 (settled), 0 (refused: it was taken over by somebody else) or -1 (nothing done: the server
-- has lost its data; the worker must renew what it holds and come again).
-- #flags allow-oom
-- #include _time _locks _queue _wake _groups
local consumer, replies = ARGV[1], {}
local data_lost = ARGV[2] ~= '' and redis.call('GET', '$EPOCH') ~= ARGV[2]
for position, s in ipairs(cmsgpack.unpack(ARGV[3])) do
  local ours = owns(s.stream, consumer, s.entry, s.deliveries)
  local unknown = not ours and data_lost
  if ours then
    remove(s.stream, s.entry)
    redis.call('HDEL', '$HELD_PREFIX' .. consumer, orphan(s.stream, s.entry))
    if s.retry then
      delay(s.retry.task, s.retry.due, s.retry.stream, 'retry', '0', s.retry.data)
    end
    if s.requeue then enqueue(s.requeue.stream, s.requeue.data, s.requeue.since) end
    if s.dead then redis.call('XADD', '$DEAD_LETTERS', '*', 'reason', s.dead.reason, 'data', s.dead.data) end
    if s.group then child_done(s.group.id, s.group.child, s.group.failed) end
    if s.result then
      redis.call('SET', s.result.key, s.result.value, 'PX', s.result.ttl_ms)
      redis.call('PUBLISH', s.result.key, '')
    end
  end
  if s.locks and not unknown then
    release_all(s.locks)
    for _, lock in ipairs(s.locks) do
      redis.call('HDEL', '$HELD_PREFIX' .. consumer, lock.owner .. ':' .. lock.key)
    end
  end
  replies[position] = ours and 1 or unknown and -1 or 0
end
return replies
