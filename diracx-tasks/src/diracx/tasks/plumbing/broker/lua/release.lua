-- Give locks back; those of other owners stay as they are. Wakes the tasks that wait for them.
-- KEYS: none. ARGV: locks (msgpack list of tables).
-- Returns the number of locks that were held and are now free.
-- #flags allow-oom
-- #include _time _lines _locks _queue _looks _wake
return release_all(cmsgpack.unpack(ARGV[1]))
