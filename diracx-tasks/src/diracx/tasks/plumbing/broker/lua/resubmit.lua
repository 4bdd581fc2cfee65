-- Submit dead letters again, each of them once however often this is asked: submitting and noting that it was
-- done are one step. Nobody needs to know whether an earlier call, of this process or another, got here.
-- KEYS: none. ARGV: how long to remember (ms), dead letters (msgpack list of {ticket, stream, data}).
-- Returns a list of 1 (submitted now) or 0 (it had been before).
-- #include _time _lines _queue
local replies = {}
for position, dead_letter in ipairs(cmsgpack.unpack(ARGV[2])) do
  local first = redis.call('SET', '$RESUBMITTED_PREFIX' .. dead_letter.ticket, 1, 'NX', 'PX', ARGV[1])
  if first then enqueue(dead_letter.stream, dead_letter.data) end
  replies[position] = first and 1 or 0
end
return replies
