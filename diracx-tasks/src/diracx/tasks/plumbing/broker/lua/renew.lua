-- Renew everything a worker holds: its own life, its stream entries, its locks.
-- KEYS: none. ARGV: consumer, lease (ms), entries (msgpack list of {stream, entry, deliveries}), locks (list).
-- Returns {positions of lost entries, positions of lost locks}.
-- #include _time _locks _queue
local consumer, now = ARGV[1], now_us()
redis.call('ZADD', '$ALIVE', int(now / 1000 + tonumber(ARGV[2])), consumer)
local lost_entries, lost_locks = {}, {}
for position, e in ipairs(cmsgpack.unpack(ARGV[3])) do
  if owns(e.stream, consumer, e.entry, e.deliveries) then
    redis.call('XCLAIM', e.stream, '$GROUP', consumer, 0, e.entry, 'JUSTID')
  else
    lost_entries[#lost_entries + 1] = position
  end
end
for position, lock in ipairs(cmsgpack.unpack(ARGV[4])) do
  if not kinds[lock.kind].keep(lock, now) then lost_locks[#lost_locks + 1] = position end
end
return {lost_entries, lost_locks}
