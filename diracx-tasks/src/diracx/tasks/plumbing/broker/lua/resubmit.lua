-- Submits dead letters again, each ticket once: submission and record are one step, so that the call is safe to repeat,
-- also by another process.
-- KEYS: none. ARGV: time to live of the records (ms), dead letters (msgpack list of {ticket, stream, data}).
-- Returns a list of 1 (submitted now) or 0 (it had been before).
-- #include _time _lines _queue
local replies = {}
for position, dead_letter in ipairs(cmsgpack.unpack(ARGV[2])) do
  local first = redis.call('SET', '$RESUBMITTED_PREFIX' .. dead_letter.ticket, 1, 'NX', 'PX', ARGV[1])
  if first then enqueue(dead_letter.stream, dead_letter.data) end
  replies[position] = first and 1 or 0
end
return replies
