-- For each delivery: take all the locks of its task, or park it until they can be had.
-- KEYS: none. ARGV: consumer, deliveries (msgpack list of
--   {stream, entry, deliveries, task, rank, handover, since, locks, retry_ms}), the consumer's lease (ms) or 0.
-- Returns a list, one for each delivery: {1} granted; {0, position of the refusing lock, due in ms} parked;
-- {-1} no longer ours. At its end the fencing token of the first delivery, or 0; each of the others has the next one.
-- Refusal and parking are one step: a lock that is given back in between cannot be missed.
-- #flags allow-oom
-- #include _time _alive _pending _parts _locks _queue _wake _cancel _redelivery _fencing
local MAX_PRIORITY_SPAN = 2251799813685248 -- 2^51 µs: later than any time, small enough to stay exact

-- The place in line is that of the submission (µs), not of whoever happened to ask first.
local function queued_at(entry)
  local ms, sequence = string.match(entry, '^(%d+)-(%d+)$')
  return int(tonumber(ms) * 1000 + math.min(tonumber(sequence), 999))
end

local consumer, now, replies, lines, any_granted = ARGV[1], now_us(), {}, {}, false
local ledger = '$HELD_PREFIX' .. consumer
sign_on(consumer, tonumber(ARGV[3]), now)
local deliveries = cmsgpack.unpack(ARGV[2])
local places = {}
for _, d in ipairs(deliveries) do places[#places + 1], places[#places + 2] = d.stream, d.entry end
local pending = all_pending_of(consumer, places, 2)
-- What is noted and not held does no harm. What is held and not noted nobody would give back.
for _, d in ipairs(deliveries) do
  for _, lock in ipairs(pending[d.stream][d.entry] == d.deliveries and d.locks or {}) do
    lines[#lines + 1], lines[#lines + 2] = ledger_line(lock)
  end
end
in_parts(lines, function(...) redis.call('HSET', ledger, ...) end)
for position, d in ipairs(deliveries) do
  if pending[d.stream][d.entry] ~= d.deliveries then
    replies[position] = {-1}
  else
    local since = d.since
    if since == '0' then since = queued_at(d.entry) end
    local place = d.rank * MAX_PRIORITY_SPAN + tonumber(since)
    local granted, refusing = take_all(d.locks, now, d.task, place)
    if granted then
      any_granted = any_granted or d.locks[1] ~= nil
      for _, lock in ipairs(d.locks) do
        -- Its timer may have brought it here: then it still stands in line.
        if d.since ~= '0' then redis.call('ZREM', '$WAITING_PREFIX' .. lock.key, lock.kind .. ':' .. d.task) end
      end
      replies[position] = {1}
    else
      local there = redis.call('XRANGE', d.stream, d.entry, d.entry)[1]
      local fields = there and there[2] or {}
      local data, deaths = data_of(fields) or '', deaths_of(d.stream, d.entry, d.deliveries, field_of(fields, 'deaths'))
      local lock, again = d.locks[refusing], nil
      local waiting, waiter = '$WAITING_PREFIX' .. lock.key, lock.kind .. ':' .. d.task
      redis.call('ZADD', waiting, int(place), waiter)
      if lock.kind == 'rate' then
        local ahead = redis.call('ZRANK', waiting, waiter)
        again = quota_returns(lock, ahead * lock.n_items) + ahead -- a µs apart, to stay in line
      else
        again = now + look_again_in(lock, d.retry_ms) * 1000
      end
      local due = again / 1000
      redis.call('PEXPIRE', waiting, int(due - now / 1000 + 2 * d.retry_ms))
      remove(d.stream, d.entry)
      since = with_occurrence(since, field_of(fields, 'occurrence'))
      delay(d.task, due, d.handover, lock.kind == 'rate' and 'rate' or 'lock', since, data, deaths, lock.key)
      pass_on(d.locks, refusing, d.task)
      local given_up = {}
      for _, each in ipairs(d.locks) do given_up[#given_up + 1] = ledger_line(each) end
      in_parts(given_up, function(...) redis.call('HDEL', ledger, ...) end)
      replies[position] = {0, refusing, int(math.ceil(due))}
    end
  end
end
replies[#deliveries + 1] = any_granted and take_tokens(#deliveries, now) or 0
return replies
