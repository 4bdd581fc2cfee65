-- Hand a worker what it reserved without hearing of it: the connection was lost before the answer came.
-- KEYS: its streams, most urgent first. ARGV: consumer, what it knows to hold (msgpack list of "stream entry").
-- Returns messages as reclaim.lua does.
-- #flags allow-oom
-- #include _time _cancel _redelivery
local consumer, known, messages, marks = ARGV[1], {}, {}, any_cancelled()
for _, held in ipairs(cmsgpack.unpack(ARGV[2])) do known[held] = true end
for position, stream in ipairs(KEYS) do
  local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', 10000, consumer)
  for _, p in ipairs(pending.err and {} or pending) do
    if not known[stream .. ' ' .. p[1]] then
      local claimed = redis.call('XCLAIM', stream, '$GROUP', consumer, 0, p[1], 'RETRYCOUNT', p[4])
      if claimed[1] then hand_out(messages, position, with_survivals(stream, claimed[1], p[4]), p[4], marks) end
    end
  end
end
return messages
