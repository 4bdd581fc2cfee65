-- Reclaims messages and locks of dead workers, a limited number per call.
-- KEYS: the streams of the caller, most urgent first. ARGV: consumer, number of free slots,
--   the streams of each size (msgpack list of lists), the caller's lease (ms), which is renewed if it ends soon,
--   the redelivery count of a poison candidate, that of a poison message.
-- A message that has lost several workers may have killed them, or another task on the same workers did. So a poison
-- candidate is given to a worker that holds nothing else, and that worker gets nothing else meanwhile: if it dies, the
-- candidate was the cause. A poison message will not run again: it is delivered to be rejected, but not before its last
-- worker has had the time to come back.
-- When each worker holds something, one of them drains: it fetches nothing until it has settled all that it holds.
-- By priority here too: before it reclaims an ordinary message, the caller gets new ones of more urgent streams.
-- Returns {messages like fetch.lua, each with its delivery count; time to the next call (ms): 0, with the next free
-- slot, if there were too few slots or there is more to do; a second while a candidate waits; the time when a poison
-- message may be rejected; else the end of the next lease; 1 if the caller is to drain}. Releases the locks of a dead
-- worker, readers included, and deletes its consumers when no message is left in them. Messages that are left concern
-- workers of the same size only: the dead worker gets a score below zero in `$ALIVE`, made of the size and the time of
-- the last attempt.
-- #flags allow-oom
-- #include _time _alive _lines _kinds _locks _queue _polls _wake _cancel _redelivery
local now_ms = math.floor(now_us() / 1000)
ensure_alive(ARGV[1], tonumber(ARGV[4]), now_us())
local first_end = tonumber(redis.call('ZRANGE', '$ALIVE', 0, 0, 'WITHSCORES')[2] or 0)
-- A new worker may have a lease that ends earlier than those of all others.
local poll_within_ms = shortest_lease() or math.huge
if first_end > now_ms then -- the usual case: no dead worker
  return {{}, math.min(first_end - now_ms + 1, poll_within_ms), 0}
end
note_contact(tonumber(ARGV[4]), now_us())
local consumer, free, messages, marks = ARGV[1], tonumber(ARGV[2]), {}, any_cancelled()
local sizes, candidate_from, max_deliveries = cmsgpack.unpack(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LEFT_OVER_MS = 1000 -- a worker may hold nothing by then
local SIZE_MS = 1e13 -- between two sizes, more than any time
local DEAD, PORTION = 10, 100 -- dead workers, new ones and earlier ones, in one call; messages in one XPENDING
-- Limits of one call: released locks, examined messages of dead workers and of the caller; fewer with large messages.
local locks_left, reads_left, held_reads_left = 150, 400, 100
local BYTES = 2048
local DOUBT = 3 -- leases to wait for the last worker of a poison message, which may only have lost its connection
local slots_too_few, waits_ms, urgent_seen, doubtful = false, math.huge, 0, {}
local draining_key = '$DRAINING_PREFIX' .. KEYS[1]
local draining = redis.call('GET', draining_key)
local candidate_left = false

-- Class of a message by its redelivery count ('poison', 'candidate' or 'ordinary'), and its bytes.
local function class_of(stream, entry, deliveries)
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  local redelivery_count = count_redeliveries(stream, entry, deliveries, found and field_of(found[2], 'deaths'))
  local class = redelivery_count >= max_deliveries and 'poison' or redelivery_count >= candidate_from and 'candidate' or 'ordinary'
  return class, #(found and data_of(found[2]) or '')
end

-- Class of the messages that the caller holds: 'candidate', 'ordinary' or nil; poison, which does not run, is ignored.
-- No other running message is held with a candidate, so if more is held than examined, there is none.
local function class_of_held()
  -- After a loss of data, only the held-locks record contains the running tasks.
  local found = redis.call('EXISTS', '$HELD_PREFIX' .. consumer) == 1 and 'ordinary' or nil
  for _, stream in ipairs(KEYS) do
    local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', PORTION, consumer)
    for _, p in ipairs(pending.err and {} or pending) do
      if held_reads_left <= 0 then return found or 'ordinary' end
      local class, bytes = class_of(stream, p[1], tonumber(p[4]))
      held_reads_left = held_reads_left - 1 - bytes / BYTES
      if class == 'candidate' then return class end
      if class == 'ordinary' then found = class end
    end
  end
  return found
end

local held_class, known = nil, false
local function may_take(class)
  if class == 'poison' then return true end
  if not known then held_class, known = class_of_held(), true end
  if held_class == 'candidate' then return false end
  if class == 'candidate' then
    candidate_left = candidate_left or held_class ~= nil
    if held_class then return false end
  elseif draining == consumer then
    return false -- it drains for a candidate
  end
  held_class = class
  return true
end

-- Takes new messages of the streams before this one.
local function take_more_urgent(position)
  while free > 0 and urgent_seen < position - 1 do
    urgent_seen = urgent_seen + 1
    local reply = redis.pcall(
      'XREADGROUP', 'GROUP', '$GROUP', consumer, 'COUNT', free, 'STREAMS', KEYS[urgent_seen], '>')
    for _, entry in ipairs(reply and not reply.err and reply[1][2] or {}) do
      add_delivery(messages, urgent_seen, entry, 1, marks)
      free = free - 1
    end
  end
end

-- Time (ms) until a poison message of a dead worker may be rejected; a worker that comes back before still has it. The
-- time without a renewal starts when the death is noticed, as the server may have been unavailable.
local function doubt_ms(stream, worker, entry, unrenewed_ms, is_new)
  if is_new then
    redis.call('XCLAIM', stream, '$GROUP', worker, 0, entry, 'JUSTID')
    unrenewed_ms = 0
  end
  local lease_ms = redis.call('ZSCORE', '$LEASES', worker) or longest_lease(tonumber(ARGV[4]))
  return DOUBT * lease_ms - unrenewed_ms
end

-- Reclaims messages of a dead worker in one stream, for the free slots of the caller.
local function reclaim_from(position, stream, worker, is_new)
  local from, pending = '-', nil
  while reads_left > 0 do -- to the end: messages that may be taken can be behind candidates that may not
    pending = redis.pcall('XPENDING', stream, '$GROUP', from, '+', PORTION, worker)
    for _, p in ipairs(pending.err and {} or pending) do
      if reads_left <= 0 then return end
      local class, bytes
      if free > 0 then class, bytes = class_of(stream, p[1], tonumber(p[4]) + 1) end
      reads_left = reads_left - 1 - (bytes or 0) / BYTES
      local doubt = class == 'poison' and doubt_ms(stream, worker, p[1], p[3], is_new) or 0
      if doubt > 0 then
        waits_ms, doubtful[worker] = math.min(waits_ms, doubt), true
      elseif class and not may_take(class) then
        waits_ms = math.min(waits_ms, LEFT_OVER_MS)
      else
        if class == 'ordinary' then take_more_urgent(position) end
        if free <= 0 then
          slots_too_few = true
          return
        end
        local claimed = redis.call('XCLAIM', stream, '$GROUP', consumer, 0, p[1])
        if claimed[1] then
          add_delivery(messages, position, with_survivals(stream, claimed[1], p[4] + 1), p[4] + 1, marks)
          free = free - 1
        end
      end
      from = '(' .. p[1]
    end
    if #pending < PORTION then return end
  end
end

-- Releases the locks of a dead worker. False when there are more than this call may release.
local function unlock(worker)
  local held = '$HELD_PREFIX' .. worker
  local lines = locks_left > 0 and redis.pcall('HRANDFIELD', held, locks_left, 'WITHVALUES') or {}
  if lines.err then -- a key of the wrong type
    redis.call('UNLINK', held)
  elseif lines[1] then
    local fields = {}
    for line = 1, #lines, 2 do fields[#fields + 1] = lines[line] end
    redis.call('HDEL', held, unpack(fields))
    release_all(locks_in(lines))
    locks_left = locks_left - #fields
  end
  return redis.call('EXISTS', held) == 0
end

-- Deletes the consumers of a dead worker without messages; it stays on the list, for its size, while messages are left.
local function clear(worker)
  local left
  for size, streams in ipairs(sizes) do
    for _, stream in ipairs(streams) do
      local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', 1, worker)
      if not pending.err then
        if pending[1] then
          left = left or size
        else
          redis.call('XGROUP', 'DELCONSUMER', stream, '$GROUP', worker)
        end
      end
    end
  end
  if not doubtful[worker] then redis.call('ZREM', '$LEASES', worker) end
  if left then
    redis.call('ZADD', '$ALIVE', int(now_ms - left * SIZE_MS), worker)
  else
    redis.call('ZREM', '$ALIVE', worker)
  end
end

local mine
for size, streams in ipairs(sizes) do
  if streams[1] == KEYS[1] then mine = size end
end
local dead = redis.call('ZRANGEBYSCORE', '$ALIVE', 0, int(now_ms), 'LIMIT', 0, DEAD)
local left = redis.call(
  'ZRANGEBYSCORE', '$ALIVE', int(-mine * SIZE_MS), int(-mine * SIZE_MS + SIZE_MS - 1), 'LIMIT', 0, DEAD)
local earlier, more = #left, #dead == DEAD
for _, worker in ipairs(dead) do
  if worker ~= consumer then
    if not unlock(worker) then
      more = true
      break
    end
    left[#left + 1] = worker
  end
end
for position, stream in ipairs(KEYS) do
  for number, worker in ipairs(left) do reclaim_from(position, stream, worker, number > earlier) end
end
for position, worker in ipairs(left) do
  if position > earlier or not slots_too_few then clear(worker) end
end
more = more or slots_too_few or (messages[1] and (earlier == DEAD or reads_left <= 0))
if candidate_left and (not draining or draining == consumer) then
  redis.call('SET', draining_key, consumer, 'PX', 3 * LEFT_OVER_MS)
  draining = consumer
elseif draining == consumer then
  redis.call('DEL', draining_key)
  draining = nil
end
local again_ms = 0
if not more then
  local next_end = redis.call('ZRANGEBYSCORE', '$ALIVE', int(now_ms), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  again_ms = next_end and tonumber(next_end) - now_ms + 1 or tonumber(ARGV[4])
  again_ms = math.min(again_ms, poll_within_ms, math.max(waits_ms, 1))
end
return {messages, again_ms, draining == consumer and 1 or 0}
