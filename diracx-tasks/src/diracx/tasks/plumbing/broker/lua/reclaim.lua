-- Reclaim the messages and locks of dead workers, a part at a time.
-- KEYS: the streams of the caller, most urgent first. ARGV: consumer, number of free slots,
--   the streams of each size (msgpack list of lists), lease (ms): how long the caller lives from now,
--   the redelivery count that makes a message a poison candidate, the one that makes it poison.
-- A message that several workers have died with may be what killed them, or may only have been beside it each
-- time. So a poison candidate is handed to a worker that holds nothing else, and nothing is handed to a worker that
-- holds one: the next death is its own. One that is poison is no candidate: it will not run again, only be rejected,
-- but not before its last worker has had the time to come back.
-- When no worker is without work, one of them drains: it takes nothing until it has settled what it holds.
-- Urgent first, here too: before it takes over an ordinary message, the caller gets what is new in more urgent streams.
-- Returns {messages as fetch.lua does, each with its delivery count; when to look again (ms from now): with the next
-- free slot (0) where the slots were too few or there is more to do, within a second while a candidate waits, when one
-- that is poison may be rejected, and else when the next lease ends, if it is not renewed before; 1 if the caller
-- is to drain}.
-- This gives back the locks a dead worker held, readers included; its consumers go when nothing is left in them.
-- What is left concerns workers of its size alone: they find it in `$ALIVE` below zero, by size and by when one of them
-- last looked at it.
-- #flags allow-oom
-- #include _time _alive _lines _locks _queue _looks _wake _cancel _redelivery
local now_ms = math.floor(now_us() / 1000)
ensure_alive(ARGV[1], tonumber(ARGV[4]), now_us())
local first_end = tonumber(redis.call('ZRANGE', '$ALIVE', 0, 0, 'WITHSCORES')[2] or 0)
-- A worker may come whose lease ends earlier than all that are there.
local look_within_ms = shortest_lease() or math.huge
if first_end > now_ms then -- as nearly always: nobody has left anything
  return {{}, math.min(first_end - now_ms + 1, look_within_ms), 0}
end
note_contact(tonumber(ARGV[4]), now_us())
local consumer, free, messages, marks = ARGV[1], tonumber(ARGV[2]), {}, any_cancelled()
local sizes, candidate_from, max_deliveries = cmsgpack.unpack(ARGV[3]), tonumber(ARGV[5]), tonumber(ARGV[6])
local LEFT_OVER_MS = 1000 -- a worker may hold nothing by then
local SIZE_MS = 1e13 -- between two sizes, more than any time
local DEAD, PORTION = 10, 100 -- workers that have just died, and others, in one call; messages in one look
-- That one call gives back; that it looks at, of those of the dead and of those in hand, fewer large messages.
local locks_left, looks_left, looks_in_hand = 150, 400, 100
local BYTES = 2048
local DOUBT = 3 -- leases for which the last worker of a poison message is waited for, as it may only be cut off
local slots_too_few, waits_ms, urgent_seen, doubtful = false, math.huge, 0, {}
local room = '$ROOM_PREFIX' .. KEYS[1]
local room_for = redis.call('GET', room)
local candidate_left = false

-- What a message is that was handed out so often, and its bytes. Redeliveries of earlier entries are noted in the entry.
local function verdict(stream, entry, deliveries)
  local there = redis.call('XRANGE', stream, entry, entry)[1]
  local redelivery_count = count_redeliveries(stream, entry, deliveries, there and field_of(there[2], 'deaths'))
  local what = redelivery_count >= max_deliveries and 'poison' or redelivery_count >= candidate_from and 'candidate' or 'ordinary'
  return what, #(there and data_of(there[2]) or '')
end

-- What is in the caller's hands, but for what will not run: 'candidate', 'ordinary' or nothing. Nothing that runs is taken
-- beside a candidate, so where more is held than is looked at, there is none.
local function found_in_hand()
  -- Of what runs after a loss of data only the held-locks record knows.
  local found = redis.call('EXISTS', '$HELD_PREFIX' .. consumer) == 1 and 'ordinary' or nil
  for _, stream in ipairs(KEYS) do
    local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', PORTION, consumer)
    for _, p in ipairs(pending.err and {} or pending) do
      if looks_in_hand <= 0 then return found or 'ordinary' end
      local what, bytes = verdict(stream, p[1], tonumber(p[4]))
      looks_in_hand = looks_in_hand - 1 - bytes / BYTES
      if what == 'candidate' then return what end
      if what == 'ordinary' then found = what end
    end
  end
  return found
end

local in_hand, looked = nil, false
local function may_take(what)
  if what == 'poison' then return true end
  if not looked then in_hand, looked = found_in_hand(), true end
  if in_hand == 'candidate' then return false end
  if what == 'candidate' then
    candidate_left = candidate_left or in_hand ~= nil
    if in_hand then return false end
  elseif room_for == consumer then
    return false -- it is made for a candidate
  end
  in_hand = what
  return true
end

-- What is new in the streams before this one.
local function take_more_urgent(position)
  while free > 0 and urgent_seen < position - 1 do
    urgent_seen = urgent_seen + 1
    local reply = redis.pcall(
      'XREADGROUP', 'GROUP', '$GROUP', consumer, 'COUNT', free, 'STREAMS', KEYS[urgent_seen], '>')
    for _, entry in ipairs(reply and not reply.err and reply[1][2] or {}) do
      hand_out(messages, urgent_seen, entry, 1, marks)
      free = free - 1
    end
  end
end

-- How long to wait (ms) until what is poison by the death of its worker may be rejected. If that comes back before,
-- it has the message still. The time without a renewal begins anew when the death is noticed: the server may have been
-- away.
local function doubt_ms(stream, worker, entry, unrenewed_ms, is_new)
  if is_new then
    redis.call('XCLAIM', stream, '$GROUP', worker, 0, entry, 'JUSTID')
    unrenewed_ms = 0
  end
  local lease_ms = redis.call('ZSCORE', '$LEASES', worker) or longest_lease(tonumber(ARGV[4]))
  return DOUBT * lease_ms - unrenewed_ms
end

-- What a dead worker has left in one stream, as far as the caller has slots for it.
local function take_over(position, stream, worker, is_new)
  local from, pending = '-', nil
  while looks_left > 0 do -- to the end: what may be taken can stand behind candidates that may not
    pending = redis.pcall('XPENDING', stream, '$GROUP', from, '+', PORTION, worker)
    for _, p in ipairs(pending.err and {} or pending) do
      if looks_left <= 0 then return end
      local what, bytes
      if free > 0 then what, bytes = verdict(stream, p[1], tonumber(p[4]) + 1) end
      looks_left = looks_left - 1 - (bytes or 0) / BYTES
      local doubt = what == 'poison' and doubt_ms(stream, worker, p[1], p[3], is_new) or 0
      if doubt > 0 then
        waits_ms, doubtful[worker] = math.min(waits_ms, doubt), true
      elseif what and not may_take(what) then
        waits_ms = math.min(waits_ms, LEFT_OVER_MS)
      else
        if what == 'ordinary' then take_more_urgent(position) end
        if free <= 0 then
          slots_too_few = true
          return
        end
        local claimed = redis.call('XCLAIM', stream, '$GROUP', consumer, 0, p[1])
        if claimed[1] then
          hand_out(messages, position, with_survivals(stream, claimed[1], p[4] + 1), p[4] + 1, marks)
          free = free - 1
        end
      end
      from = '(' .. p[1]
    end
    if #pending < PORTION then return end
  end
end

-- Give back the locks of a dead worker. False when there are more than this call may give back.
local function unlock(worker)
  local held = '$HELD_PREFIX' .. worker
  local lines = locks_left > 0 and redis.pcall('HRANDFIELD', held, locks_left, 'WITHVALUES') or {}
  if lines.err then -- it is no held-locks record
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

-- The consumers of a dead worker go; it stays on the list as long as messages are left, for a size that has some.
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
  for number, worker in ipairs(left) do take_over(position, stream, worker, number > earlier) end
end
for position, worker in ipairs(left) do
  if position > earlier or not slots_too_few then clear(worker) end
end
more = more or slots_too_few or (messages[1] and (earlier == DEAD or looks_left <= 0))
if candidate_left and (not room_for or room_for == consumer) then
  redis.call('SET', room, consumer, 'PX', 3 * LEFT_OVER_MS)
  room_for = consumer
elseif room_for == consumer then
  redis.call('DEL', room)
  room_for = nil
end
local again_ms = 0
if not more then
  local next_end = redis.call('ZRANGEBYSCORE', '$ALIVE', int(now_ms), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  again_ms = next_end and tonumber(next_end) - now_ms + 1 or tonumber(ARGV[4])
  again_ms = math.min(again_ms, look_within_ms, math.max(waits_ms, 1))
end
return {messages, again_ms, room_for == consumer and 1 or 0}
