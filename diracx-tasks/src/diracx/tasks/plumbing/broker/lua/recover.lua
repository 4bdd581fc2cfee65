-- Hand a worker what it reserved without hearing of it: the connection was lost before the answer came.
-- KEYS: its streams, most urgent first. ARGV: consumer, what it knows to hold (msgpack list of "stream entry"), the
--   locks that it knows to hold (msgpack list of "owner:key"; nil: it does not say).
-- Returns messages as reclaim.lua does. Locks that it does not know are given back: they were granted in such a call,
-- or the server has gone back to an earlier state (a snapshot, a replica), in which they were still held. Where there
-- are more than one call may give back, it does nothing else and returns nil: ask again.
-- #flags allow-oom
-- #include _time _lines _locks _queue _wake _cancel _redelivery
local AT_ONCE = 200 -- locks that one call gives back
local consumer, known, messages, marks = ARGV[1], {}, {}, any_cancelled()
local said, ours, unknown, lines = cmsgpack.unpack(ARGV[3]), {}, {}, {}
for _, line in ipairs(said or {}) do ours[line] = true end
local ledger = said and redis.pcall('HGETALL', '$HELD_PREFIX' .. consumer) or {}
for _, lock in ipairs(ledger.err and {} or locks_in(ledger)) do
  local line = ledger_line(lock)
  if not ours[line] and #lines < AT_ONCE then
    unknown[#unknown + 1], lines[#lines + 1] = lock, line
  end
end
if lines[1] then
  release_all(unknown)
  redis.call('HDEL', '$HELD_PREFIX' .. consumer, unpack(lines))
  if #lines == AT_ONCE then return false end
end
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
