-- Renews a worker's lease, its stream entries and its locks.
-- KEYS: none. ARGV: consumer, lease (ms), entries (msgpack list of {stream, entry, deliveries}), locks (list),
--   dataset_id at the last renewal ('' at first), the shortest lease at the last renewal (ms), or '' to check all
--   lists, the run id of this server, or '', '1' if the caller's lease may have ended.
-- Returns {positions of lost entries, positions of lost locks, positions of cancelled entries, dataset_id,
--   the shortest lease of all (ms), at whose pace all workers renew; time in which no lease can end (ms)}.
-- Another dataset_id means that the server has lost its data; another run id in it, that it may have been restored to
-- earlier data (a snapshot, a replica that was behind). Entries that this worker holds may be missing then: those that
-- no other worker has are recorded in its held-locks record, and it can settle them; its locks are taken again if they
-- are free.
-- #flags allow-oom
-- #include _time _alive _pending _lines _kinds _locks _queue _cancel _redelivery
local EPOCH_MS = 86400000 -- longer than a live worker is silent
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
-- Missing on the list, or below zero: other workers may have reclaimed its messages.
local declared_dead = restarted and ARGV[8] == '1' and tonumber(redis.call('ZSCORE', '$ALIVE', consumer) or 0) <= 0
if not heartbeat(consumer, tonumber(ARGV[2]), now, known) then
  dataset_id = redis.pcall('GETEX', '$DATASET_ID', 'PX', EPOCH_MS)
  local is_named = type(dataset_id) == 'string'
  local life, of_run = life_and_run(is_named and dataset_id or consumer .. ' ' .. int(now))
  if not is_named or run ~= '' and run ~= of_run then
    dataset_id = life .. '@' .. run
    redis.call('SET', '$DATASET_ID', dataset_id, 'PX', EPOCH_MS)
  end
  local changed = int(now / 1000) .. ' ' .. int(shortest_lease()) .. ' ' .. dataset_id
  redis.call('SET', '$RENEWED', changed, 'PX', RENEWED_MS)
end
local data_lost = ARGV[5] ~= '' and (known_life ~= life_and_run(dataset_id) or restarted and not declared_dead)
-- With new data, no worker can have settled the entry, but it may have been delivered again.
local function is_in_other_hands(stream, entry)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1)
  return not pending.err and pending[1] ~= nil
end
local lost_entries, lost_locks, cancelled, entries = {}, {}, {}, cmsgpack.unpack(ARGV[3])
local marks = entries[1] and any_cancelled()
for position, e in ipairs(entries) do
  if is_pending(e.stream, consumer, e.entry, e.deliveries) then
    redis.call('XCLAIM', e.stream, '$GROUP', consumer, 0, e.entry, 'JUSTID')
    local found = marks and redis.call('XRANGE', e.stream, e.entry, e.entry)[1]
    if found and is_cancelled(data_of(found[2])) then cancelled[#cancelled + 1] = position end
  elseif data_lost and not is_in_other_hands(e.stream, e.entry) then
    redis.call('HSET', held, orphan(e.stream, e.entry), '')
  elseif not owns(e.stream, consumer, e.entry, e.deliveries) then
    note_survivor(e.stream, e.entry, e.deliveries)
    lost_entries[#lost_entries + 1] = position
  end
end
for position, lock in ipairs(cmsgpack.unpack(ARGV[4])) do
  local kind = kinds[lock.kind]
  local done, is_held = pcall(kind.keep, lock, now)
  is_held = done and is_held -- an error for a key of the wrong type
  if not is_held and data_lost then
    redis.call('HSET', held, held_line(lock))
    done, is_held = pcall(kind.take, lock, now)
    is_held = done and is_held
  end
  if not is_held then lost_locks[#lost_locks + 1] = position end
end
local first_end = tonumber(redis.call('ZRANGE', '$ALIVE', 0, 0, 'WITHSCORES')[2])
local quiet_ms = math.max(0, math.min(first_end - now / 1000, shortest_lease()))
return {lost_entries, lost_locks, cancelled, dataset_id, shortest_lease(), math.floor(quiet_ms)}
