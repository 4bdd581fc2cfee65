-- Submits dead letters again, each ticket once: submission and record are one step, so that the call is safe to repeat,
-- also by another process. The record is last: after an error in between, the call submits the rest.
-- KEYS: none. ARGV: time to live of the records (ms), dead letters (msgpack list of {ticket, stream, data}).
-- Returns a list of 1 (submitted now) or 0 (it had been before).
-- #include _time _lines _queue
local replies = {}
for position, dead_letter in ipairs(cmsgpack.unpack(ARGV[2])) do
  local key = '$RESUBMITTED_PREFIX' .. dead_letter.ticket
  local new = redis.call('EXISTS', key) == 0 and enqueue(dead_letter.stream, dead_letter.data)
  if new then redis.call('SET', key, 1, 'PX', ARGV[1]) end
  replies[position] = new and 1 or 0
end
return replies
