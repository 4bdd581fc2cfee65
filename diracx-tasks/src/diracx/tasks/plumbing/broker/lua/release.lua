-- Releases locks, except those of other owners, and grants them to waiting tasks.
-- KEYS: none. ARGV: locks (msgpack list of tables).
-- Returns the number of locks that were held and are now free.
-- #flags allow-oom
-- #include _time _lines _kinds _locks _queue _polls _wake
return release_all(cmsgpack.unpack(ARGV[1]))
