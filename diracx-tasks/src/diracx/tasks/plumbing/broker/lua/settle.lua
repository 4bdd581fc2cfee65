-- Settles deliveries. For each: removes the entry, releases the locks (and grants them to waiting tasks), and applies
-- the effects. For a delivery that another worker has reclaimed, only the locks that are still held are released.
-- KEYS: none. ARGV: consumer, dataset id at the worker's last renewal (or ''), the deliveries (flat msgpack list of
-- stream, entry, deliveries), their effects (msgpack map position -> effects, for most tasks none, with any of
--   locks   = the locks that it holds
--   result  = {key, value, ttl_ms}
--   retry   = {task, delay_ms, stream, data, occurrence, redeliveries}    delay it by `delay_ms` of the server's clock
--   requeue = {stream, data, since}             requeue it, to start elsewhere at once
--   isolate = true                              leave it for a worker that holds nothing else, as if its worker had
--   died
--   group   = {id, child, error, result}        the end of a child; without a child, extend the group's time to live
--   release_results = group id                  delete the results of the group, whose callback has ended
--   granted = lock                              it had a grant for this lock: grant the next, unless it took the lock
--   outcome = {id, text}                        outcome of an occurrence of a schedule
--   dead    = {reason, data}                    keep the dead letter until a worker imports it into the database).
-- Returns a flat list of position, reason for deliveries that were not settled: 0 (another worker has reclaimed it) or
-- -1 (the server has lost its data, nothing was done: the worker must renew and settle again); or a text, the effects
-- that the server refused, while the others were applied. If an effect that must not be lost is refused (retry,
-- requeue, dead), the entry stays and is not settled: the text begins with `kept`.
-- #flags allow-oom
-- #include _pending
local consumer, unsettled = ARGV[1], {}
local dataset_id, marks = unpack(redis.call('MGET', '$DATASET_ID', '$ANY_CANCELLED'))
local data_lost = ARGV[2] ~= '' and dataset_id ~= ARGV[2]
local places, effects_of, held = cmsgpack.unpack(ARGV[3]), cmsgpack.unpack(ARGV[4]), '$HELD_PREFIX' .. consumer
if marks and redis.call('TYPE', '$CANCELLED').ok ~= 'zset' then
  redis.call('DEL', '$ANY_CANCELLED')
  marks = nil
end
local pending = all_pending_of(consumer, places, 3)
local ended, lines = {}, {}

-- Functions that only some settlements need. A script defines its functions again in each run, and their garbage
-- collection would be most of the cost of a plain settlement.
local function effect_functions()
  -- #include _time _parts _lines _kinds _locks _queue _polls _wake _published_groups _groups _cancel _schedules _redelivery
  -- A step that fails, for a key of the wrong type, say, does not prevent the others.
  local function try(refused, step, ...)
    local done, message = pcall(step, ...)
    if not done then refused[#refused + 1] = type(message) == 'table' and message.err or tostring(message) end
    return done
  end
  local function keep(stream, entry, deliveries, s, found)
    if s.retry then
      local r, due = s.retry, now_us() / 1000 + s.retry.delay_ms
      delay(r.task, due, r.stream, 'retry', with_occurrence('0', r.occurrence), r.data, r.redeliveries)
    end
    if s.requeue then
      local again = s.requeue
      requeue(stream, entry, deliveries, found and found[2] or {}, again.stream, again.data, again.since)
    end
    if s.isolate then -- to the name of a stopped worker; it counts as no redelivery
      redis.call('XCLAIM', stream, '$GROUP', consumer .. ':aside', 0, entry, 'JUSTID')
      note_survivor(stream, entry, deliveries, true)
      redis.call('ZADD', '$ALIVE', 0, consumer .. ':aside')
      redis.pcall('PUBLISH', '$LEASES', '0') -- so that all workers reclaim now
    end
    if s.dead then redis.call('XADD', '$DEAD_LETTERS', '*', 'reason', s.dead.reason, 'data', s.dead.data) end
  end
  local function store(result)
    redis.call('SET', result.key, result.value, 'PX', result.ttl_ms)
    redis.call('PUBLISH', result.key, '')
  end
  local function apply_effects(stream, entry, deliveries, s)
    local refused = {}
    for _, lock in ipairs(s.locks or {}) do
      if lock.key == s.granted then s.granted = nil end
    end
    local wanted = s.granted or s.requeue or (marks and not s.retry)
    local found = wanted and redis.call('XRANGE', stream, entry, entry)[1]
    local task = found and not s.requeue and task_of(data_of(found[2]))
    if not try(refused, keep, stream, entry, deliveries, s, found) then return 'kept: ' .. refused[1] end
    if s.isolate then return end
    remove(stream, entry) -- before the rest, which must not be applied twice after an error
    if task and marks and not s.retry then try(refused, redis.call, 'ZREM', '$CANCELLED', task) end
    if s.group then try(refused, child_done, s.group) end
    if s.release_results then try(refused, forget_results, s.release_results) end
    if s.outcome then try(refused, note_outcome, s.outcome) end
    if s.granted then try(refused, give_up_grant, {key = s.granted}, task) end
    if s.result then try(refused, store, s.result) end
    return refused[1] and table.concat(refused, '; ')
  end
  local function unlock(locks)
    release_all(locks)
    for _, lock in ipairs(locks) do lines[#lines + 1] = held_line(lock) end
  end
  return apply_effects, unlock, in_parts
end

local function survived(stream, entry, deliveries)
  -- #include _time _redelivery
  note_survivor(stream, entry, deliveries)
end

local apply_effects, unlock, in_parts
for at = 1, #places, 3 do
  local stream, entry, position = places[at], places[at + 1], (at + 2) / 3
  local s = effects_of[position]
  -- After a loss of data nothing is settled, not even later deliveries: a concurrent renewal would record them again.
  local is_held = not data_lost and (pending[stream][entry] == places[at + 2]
    or redis.call('HDEL', held, orphan(stream, entry)) == 1)
  if (s or marks) and not apply_effects then apply_effects, unlock, in_parts = effect_functions() end
  if is_held then
    pending[stream][entry] = nil -- a second settlement in the same call is refused
    if apply_effects and (s or marks) then
      local refused = apply_effects(stream, entry, places[at + 2], s or {})
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
