-- Takes several locks, all or none.
-- KEYS: none. ARGV: locks (msgpack list of tables).
-- Returns {1, fencing token}, or {0, position of the refusing lock, time of the next attempt (µs) or 0}.
-- #include _time _lines _kinds _locks _fencing
local granted, position, again = take_all(cmsgpack.unpack(ARGV[1]), now_us(), nil)
if granted then return {1, take_tokens(1, now_us())} end
return {0, position, again and int(again) or '0'}
