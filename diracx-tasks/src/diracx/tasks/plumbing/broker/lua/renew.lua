-- Renew everything a worker holds: its own life, its stream entries, its locks.
-- KEYS: none. ARGV: consumer, lease (ms), entries (msgpack list of {stream, entry, deliveries}), locks (list),
--   dataset_id as the worker knows it ('' at first), the shortest lease as it knows it (ms), or '' to look at everything,
--   the run id of this server, or '', '1' if the caller's lease may have ended.
-- Returns {positions of lost entries, positions of lost locks, positions of entries that are to be cancelled, dataset_id,
--   the shortest lease of all (ms): at its pace everybody renews; for how long (ms) no lease can end}.
-- Another dataset_id means that the server has lost its data; another run in it, that it may have gone back to earlier
-- ones (a snapshot, a replica that was behind). What this worker runs, and nobody else could take over, may then be known
-- to nobody: it is noted in the worker's held-locks record, and stays its own to settle; its locks are taken anew where they are
-- free.
-- #flags allow-oom
-- #include _time _alive _pending _lines _locks _queue _cancel _redelivery
local EPOCH_MS = 86400000 -- longer than any worker is silent and comes back
local consumer, now, held, run = ARGV[1], now_us(), '$HELD_PREFIX' .. ARGV[1], ARGV[7] or ''
-- A dataset id is `{worker} {microseconds}@{run id}`.
local function life_and_run(id)
  local life, of_run = string.match(id, '^(.*)@(%x*)$')
  return life or id, of_run or ''
end
local known_life, known_run = life_and_run(ARGV[5])
local restarted = run ~= '' and known_run ~= '' and run ~= known_run
local known = not restarted and ARGV[5] ~= '' and ARGV[6] ~= '' and ARGV[6] .. ' ' .. ARGV[5] or nil
local dataset_id = ARGV[5]
-- Off the list, or below zero: others may have taken over what it had.
local declared_dead = restarted and ARGV[8] == '1' and tonumber(redis.call('ZSCORE', '$ALIVE', consumer) or 0) <= 0
if not heartbeat(consumer, tonumber(ARGV[2]), now, known) then
  dataset_id = redis.pcall('GETEX', '$EPOCH', 'PX', EPOCH_MS)
  local is_named = type(dataset_id) == 'string'
  local life, of_run = life_and_run(is_named and dataset_id or consumer .. ' ' .. int(now))
  if not is_named or run ~= '' and run ~= of_run then
    dataset_id = life .. '@' .. run
    redis.call('SET', '$EPOCH', dataset_id, 'PX', EPOCH_MS)
  end
  local changed = int(now / 1000) .. ' ' .. int(shortest_lease()) .. ' ' .. dataset_id
  redis.call('SET', '$RENEWED', changed, 'PX', RENEWED_MS)
end
local data_lost = ARGV[5] ~= '' and (known_life ~= life_and_run(dataset_id) or restarted and not declared_dead)
-- Nobody can have settled it in that life, but it may have been handed out anew.
local function is_in_other_hands(stream, entry)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1)
  return not pending.err and pending[1] ~= nil
end
local lost_entries, lost_locks, cancelled, entries = {}, {}, {}, cmsgpack.unpack(ARGV[3])
local marks = entries[1] and any_cancelled()
for position, e in ipairs(entries) do
  if is_pending(e.stream, consumer, e.entry, e.deliveries) then
    redis.call('XCLAIM', e.stream, '$GROUP', consumer, 0, e.entry, 'JUSTID')
    local there = marks and redis.call('XRANGE', e.stream, e.entry, e.entry)[1]
    if there and is_cancelled(data_of(there[2])) then cancelled[#cancelled + 1] = position end
  elseif data_lost and not is_in_other_hands(e.stream, e.entry) then
    redis.call('HSET', held, orphan(e.stream, e.entry), '')
  elseif not owns(e.stream, consumer, e.entry, e.deliveries) then
    note_survivor(e.stream, e.entry, e.deliveries)
    lost_entries[#lost_entries + 1] = position
  end
end
for position, lock in ipairs(cmsgpack.unpack(ARGV[4])) do
  local kind = kinds[lock.kind]
  local looked, ours = pcall(kind.keep, lock, now)
  ours = looked and ours -- a key of another type is no lock of ours
  if not ours and data_lost then
    redis.call('HSET', held, held_line(lock))
    looked, ours = pcall(kind.take, lock, now)
    ours = looked and ours
  end
  if not ours then lost_locks[#lost_locks + 1] = position end
end
local first_end = tonumber(redis.call('ZRANGE', '$ALIVE', 0, 0, 'WITHSCORES')[2])
local quiet_ms = math.max(0, math.min(first_end - now / 1000, shortest_lease()))
return {lost_entries, lost_locks, cancelled, dataset_id, shortest_lease(), math.floor(quiet_ms)}
