-- Cancel tasks. What waits in the delayed set, or is queued at the given place, is gone with this step, and its
-- group and who waits for its result are told; what runs is announced to the worker that runs it, all in one
-- message, and a mark stays for those that hear of it in another way (fetch.lua, reclaim.lua, recover.lua, renew.lua),
-- until the task has ended or the mark's time is over.
-- KEYS: none. ARGV: time a mark is kept (ms), tasks (msgpack list of {task} with any of
--   marked = 1, when we have marked it before; no mark then means that the worker that had it has settled it
--   known  = 1, once its message was looked at, and then:
--   result, group, release_results, outcome, as in settle.lua;
--   stream, entry: where it was found,
--   waiting = 1, if it is to be cancelled only as long as it waits there),
-- and the most bytes of messages to read (but for what is larger alone).
-- Returns for each, or for the first ones (ask again for the others), {place, message}: place is the reason of the delayed set, `queued`, `running`, or '' for
-- nowhere; a message comes with the place of a task that is not known yet: look at it and ask again.
-- #flags allow-oom
-- #include _time _lines _locks _queue _looks _wake _published_groups _groups _cancel _schedules
local replies, running, lines, now_ms, keep_ms = {}, {}, {}, now_us() / 1000, tonumber(ARGV[1])
local bytes_left = tonumber(ARGV[3])
trim('$CANCELLED', int(now_ms))

local function mark(task)
  redis.call('ZADD', '$CANCELLED', int(now_ms + keep_ms), task)
end

-- What follows for others. A key of another type keeps neither the rest nor other tasks from their end.
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
  local there = t.entry and redis.call('XRANGE', t.stream, t.entry, t.entry)[1]
  bytes_left = bytes_left - #(stored or there and data_of(there[2]) or '')
  if t.waiting and not there then
    replies[position] = {'', ''}
  elseif stored and not t.waiting then
    local stream, reason, _, _, data = parts_of(stored)
    if not stream then -- nobody waits for what cannot be read
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
  elseif there then
    local pending = redis.pcall('XPENDING', t.stream, '$GROUP', t.entry, t.entry, 1)
    if pending.err or #pending == 0 then
      redis.call('XDEL', t.stream, t.entry)
      finish(t)
      local granted = field_of(there[2], 'woken')
      if granted then give_up_turn({key = granted}, t.task) end
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
for lock in pairs(lines) do look_at(lock, now_ms) end -- those behind may be of another kind
if redis.call('PEXPIRE', '$CANCELLED', int(keep_ms)) == 1 then
  redis.call('SET', '$ANY_CANCELLED', 1, 'PX', int(keep_ms))
end
for worker, tasks in pairs(running) do
  redis.call('PUBLISH', '$CANCELLED_CHANNEL_PREFIX' .. worker, cmsgpack.pack(tasks))
end
return replies
