-- Put a message aside until it is due.
-- KEYS: none. ARGV: task id, due (ms since the epoch), stream, reason, message.
-- #include _time _queue
delay(ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], '0', ARGV[5])
return 1
