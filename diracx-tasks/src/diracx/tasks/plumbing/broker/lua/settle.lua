-- The end of executions. For each: remove the entry, give the locks back (waking who waits), and do the
-- one thing that follows. A delivery that is no longer ours changes nothing but the locks we still hold.
-- KEYS: none. ARGV: consumer, dataset id as the worker knows it (or ''), the deliveries (msgpack list of stream, entry,
-- deliveries of one after another), what follows on them (msgpack map position -> what, for most nothing, with any of
--   locks   = those it holds
--   result  = {key, value, ttl_ms}
--   retry   = {task, delay_ms, stream, data, occurrence}    put aside for so long, by the server's clock
--   requeue = {stream, data, since}             handed back, to start elsewhere at once
--   aside   = true                              left for a worker that holds nothing else, as the dead leave theirs
--   group   = {id, child, error, result}        one child less to wait for; without a child, a sign of life
--   release_results = group id                  its callback has ended and needs the results no more
--   granted = lock                              it had the turn for it: the next has it, unless it took the lock
--   outcome = {id, text}                        how an occurrence of a schedule ended
--   dead    = {reason, data}                    kept until a worker imports it into a database).
-- Returns a list of position, why of each that was not settled: 0 (refused: it was taken over by another worker) or
-- -1 (nothing done: the server has lost its data; the worker must renew what it holds and come again); or, as text,
-- what of that which follows was refused: the rest was done. What has to be kept and cannot be (retry, requeue, dead)
-- leaves the entry where it is, which is then not settled: the text begins with `kept`.
-- #flags allow-oom
-- #include _pending
local consumer, unsettled = ARGV[1], {}
local dataset_id, marks = unpack(redis.call('MGET', '$EPOCH', '$ANY_CANCELLED'))
local data_lost = ARGV[2] ~= '' and dataset_id ~= ARGV[2]
local places, follows, held = cmsgpack.unpack(ARGV[3]), cmsgpack.unpack(ARGV[4]), '$HELD_PREFIX' .. consumer
if marks and redis.call('TYPE', '$CANCELLED').ok ~= 'zset' then
  redis.call('DEL', '$ANY_CANCELLED')
  marks = nil
end
local pending = all_pending_of(consumer, places, 3)
local ended, lines = {}, {}

-- What only some settlements need. Functions are made anew in each run of a script, and the server's Lua has to
-- collect them: that is most of what a plain settlement would cost.
local function following()
  -- #include _time _parts _lines _locks _queue _looks _wake _published_groups _groups _cancel _schedules _redelivery
  -- One step that fails, as for a key of another type, must not keep the others from being done.
  local function try(refused, step, ...)
    local done, why = pcall(step, ...)
    if not done then refused[#refused + 1] = type(why) == 'table' and why.err or tostring(why) end
    return done
  end
  local function keep(stream, entry, deliveries, s, there)
    if s.retry then
      local due = now_us() / 1000 + s.retry.delay_ms
      delay(s.retry.task, due, s.retry.stream, 'retry', with_occurrence('0', s.retry.occurrence), s.retry.data)
    end
    if s.requeue then
      local again = s.requeue
      put_back(stream, entry, deliveries, there and there[2] or {}, again.stream, again.data, again.since)
    end
    if s.aside then -- to a name that has signed off; nobody has died of it
      redis.call('XCLAIM', stream, '$GROUP', consumer .. ':aside', 0, entry, 'JUSTID')
      note_survivor(stream, entry, deliveries, true)
      redis.call('ZADD', '$ALIVE', 0, consumer .. ':aside')
      redis.pcall('PUBLISH', '$LEASES', '0') -- so that all look for what the dead have left
    end
    if s.dead then redis.call('XADD', '$DEAD_LETTERS', '*', 'reason', s.dead.reason, 'data', s.dead.data) end
  end
  local function store(result)
    redis.call('SET', result.key, result.value, 'PX', result.ttl_ms)
    redis.call('PUBLISH', result.key, '')
  end
  local function follow(stream, entry, deliveries, s)
    local refused = {}
    for _, lock in ipairs(s.locks or {}) do
      if lock.key == s.granted then s.granted = nil end
    end
    local looked = s.granted or s.requeue or (marks and not s.retry)
    local there = looked and redis.call('XRANGE', stream, entry, entry)[1]
    local task = there and not s.requeue and task_of(data_of(there[2]))
    if not try(refused, keep, stream, entry, deliveries, s, there) then return 'kept: ' .. refused[1] end
    if s.aside then return end
    remove(stream, entry) -- before the rest: should that go wrong, it must not be done twice
    if task and marks and not s.retry then try(refused, redis.call, 'ZREM', '$CANCELLED', task) end
    if s.group then try(refused, child_done, s.group) end
    if s.release_results then try(refused, forget_results, s.release_results) end
    if s.outcome then try(refused, note_outcome, s.outcome) end
    if s.granted then try(refused, give_up_turn, {key = s.granted}, task) end
    if s.result then try(refused, store, s.result) end
    return refused[1] and table.concat(refused, '; ')
  end
  local function unlock(locks)
    release_all(locks)
    for _, lock in ipairs(locks) do lines[#lines + 1] = held_line(lock) end
  end
  return follow, unlock, in_parts
end

local function survived(stream, entry, deliveries)
  -- #include _time _redelivery
  note_survivor(stream, entry, deliveries)
end

local follow, unlock, in_parts
for at = 1, #places, 3 do
  local stream, entry, position = places[at], places[at + 1], (at + 2) / 3
  local s = follows[position]
  -- After a loss nothing is settled, what came since included: a renewal on its way would note it as ours once more.
  local ours = not data_lost and (pending[stream][entry] == places[at + 2]
    or redis.call('HDEL', held, orphan(stream, entry)) == 1)
  if (s or marks) and not follow then follow, unlock, in_parts = following() end
  if ours then
    pending[stream][entry] = nil -- who says it twice is refused the second time
    if follow and (s or marks) then
      local refused = follow(stream, entry, places[at + 2], s or {})
      if refused then
        unsettled[#unsettled + 1] = position
        unsettled[#unsettled + 1] = refused
      end
    else
      ended[stream] = ended[stream] or {}
      table.insert(ended[stream], entry)
    end
  else
    unsettled[#unsettled + 1] = position
    unsettled[#unsettled + 1] = data_lost and -1 or 0
    if not data_lost then survived(stream, entry, places[at + 2]) end
  end
  if s and s.locks and not data_lost then unlock(s.locks) end
end
if lines[1] then in_parts(lines, function(...) redis.call('HDEL', held, ...) end) end
for stream, entries in pairs(ended) do
  for from = 1, #entries, 1000 do -- as in _parts.lua
    local to = math.min(from + 999, #entries)
    redis.call('XACK', stream, '$GROUP', unpack(entries, from, to))
    redis.call('XDEL', stream, unpack(entries, from, to))
  end
end
return unsettled
