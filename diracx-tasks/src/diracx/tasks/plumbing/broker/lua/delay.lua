-- Put messages aside until they are due: all of them or none.
-- KEYS: none. ARGV: for each of them task id, due (ms since the epoch), stream, reason, message.
-- #include _time _queue
for i = 1, #ARGV, 5 do
  delay(ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3], '0', ARGV[i + 4])
end
return 1
