-- Renew everything a worker holds: its own life, its stream entries, its locks.
-- KEYS: none. ARGV: consumer, lease (ms), entries (msgpack list of {stream, entry, deliveries}), locks (list).
-- Returns {positions of lost entries, positions of lost locks, positions of entries that are to be cancelled}.
-- #include _time _locks _queue _cancel
local consumer, now = ARGV[1], now_us()
redis.call('ZADD', '$ALIVE', int(now / 1000 + tonumber(ARGV[2])), consumer)
local lost_entries, lost_locks, cancelled, marks = {}, {}, {}, any_cancelled()
for position, e in ipairs(cmsgpack.unpack(ARGV[3])) do
  if owns(e.stream, consumer, e.entry, e.deliveries) then
    redis.call('XCLAIM', e.stream, '$GROUP', consumer, 0, e.entry, 'JUSTID')
    local there = marks and redis.call('XRANGE', e.stream, e.entry, e.entry)[1]
    if there and is_cancelled(data_of(there[2])) then cancelled[#cancelled + 1] = position end
  else
    lost_entries[#lost_entries + 1] = position
  end
end
for position, lock in ipairs(cmsgpack.unpack(ARGV[4])) do
  if not kinds[lock.kind].keep(lock, now) then lost_locks[#lost_locks + 1] = position end
end
return {lost_entries, lost_locks, cancelled}
