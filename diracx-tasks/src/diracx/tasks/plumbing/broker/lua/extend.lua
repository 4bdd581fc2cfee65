-- Renews locks to their full time to live.
-- KEYS: none. ARGV: locks (msgpack list of tables).
-- Returns a list of 1 (still held, renewed) or 0 (lost).
-- #flags allow-oom
-- #include _time _lines _kinds _locks
local now, kept = now_us(), {}
for position, lock in ipairs(cmsgpack.unpack(ARGV[1])) do
  kept[position] = kinds[lock.kind].keep(lock, now) and 1 or 0
end
return kept
