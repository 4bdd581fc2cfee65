-- Cancels tasks. A delayed task, or one queued at the given entry, is removed, with the effects of its end on its
-- group, schedule and result. For running tasks, their worker is notified with one message, and a mark is kept for
-- calls that miss it (fetch.lua, reclaim.lua, fetch_unacknowledged.lua, renew.lua), until the task has ended or the
-- mark has expired.
-- KEYS: none. ARGV: time to live of a mark (ms), tasks (msgpack list of {task} with any of
--   marked = 1, if an earlier call has marked it: a missing mark then means that its worker has settled it
--   known  = 1, if the caller has read its message and sends the effects:
--   result, group, release_results, outcome, as in settle.lua;
--   stream, entry: its position,
--   waiting = 1, to cancel it only while it waits there),
-- and the limit of bytes of messages to read (one larger message is allowed).
-- Returns for each, or for the first ones (repeat the call for the others), {place, message}: place is the reason of
-- the delayed set, `queued`, `running`, or '' for not found. With a message, the task is not cancelled yet: the caller
-- reads it and repeats the call with `known`.
-- #flags allow-oom
-- #include _time _lines _kinds _locks _queue _polls _wake _published_groups _groups _cancel _schedules
local replies, running, lines, now_ms, keep_ms = {}, {}, {}, now_us() / 1000, tonumber(ARGV[1])
local bytes_left = tonumber(ARGV[3])
trim('$CANCELLED', int(now_ms))

local function mark(task)
  redis.call('ZADD', '$CANCELLED', int(now_ms + keep_ms), task)
end

-- Applies the completion effects. A key of the wrong type does not affect the others.
local function finish(t)
  redis.call('ZREM', '$CANCELLED', t.task)
  if t.group then pcall(child_done, t.group) end
  if t.release_results then pcall(forget_results, t.release_results) end
  if t.outcome then pcall(note_outcome, t.outcome) end
  if t.result then
    redis.call('SET', t.result.key, t.result.value, 'PX', t.result.ttl_ms)
    redis.call('PUBLISH', t.result.key, '')
  end
end

for position, t in ipairs(cmsgpack.unpack(ARGV[2])) do
  local stored = redis.call('HGET', '$DELAYED_DATA', t.task)
  local found = t.entry and redis.call('XRANGE', t.stream, t.entry, t.entry)[1]
  bytes_left = bytes_left - #(stored or found and data_of(found[2]) or '')
  if t.waiting and not found then
    replies[position] = {'', ''}
  elseif stored and not t.waiting then
    local stream, reason, _, _, data = parts_of(stored)
    if not stream then -- unreadable
      take_delayed(t.task)
      to_dead_letters(t.task, stored)
      replies[position] = {'', ''}
    elseif t.known then
      local lock = select(6, take_delayed(t.task, stored))
      if lock then lines[lock] = true end
      finish(t)
      replies[position] = {reason, ''}
    else
      mark(t.task)
      replies[position] = {reason, data}
    end
  elseif found then
    local pending = redis.pcall('XPENDING', t.stream, '$GROUP', t.entry, t.entry, 1)
    if pending.err or #pending == 0 then
      redis.call('XDEL', t.stream, t.entry)
      finish(t)
      local granted = field_of(found[2], 'woken')
      if granted then give_up_grant({key = granted}, t.task) end
      replies[position] = {'queued', ''}
    elseif t.waiting then
      replies[position] = {'', ''}
    else
      mark(t.task)
      local worker = pending[1][2]
      running[worker] = running[worker] or {}
      table.insert(running[worker], t.task)
      replies[position] = {'running', ''}
    end
  elseif t.marked == 1 and not redis.call('ZSCORE', '$CANCELLED', t.task) then
    replies[position] = {'running', ''}
  else
    mark(t.task)
    replies[position] = {'', ''}
  end
  if bytes_left <= 0 then break end
end
for lock in pairs(lines) do schedule_poll(lock, now_ms) end -- tasks behind the cancelled ones may be granted the lock now
if redis.call('PEXPIRE', '$CANCELLED', int(keep_ms)) == 1 then
  redis.call('SET', '$ANY_CANCELLED', 1, 'PX', int(keep_ms))
end
for worker, tasks in pairs(running) do
  redis.call('PUBLISH', '$CANCELLED_CHANNEL_PREFIX' .. worker, cmsgpack.pack(tasks))
end
return replies
