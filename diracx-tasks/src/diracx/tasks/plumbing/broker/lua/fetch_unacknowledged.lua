-- Fetches again what was delivered to a worker and is not acknowledged, without the messages that it knows: the
-- reply of the call that delivered them was lost.
-- KEYS: its streams, most urgent first. ARGV: consumer, entries that it holds (msgpack list of "stream entry"), locks
--   of its held-locks record that it does not hold (msgpack list of "owner:key"), limit of messages, limit of bytes
--   (one larger message is allowed); 1 to requeue the messages, as the worker's event loop is blocked.
-- Returns {messages like reclaim.lua, 1 if there are more}. The locks are released: they were granted in such a call,
-- or the server was restored to an earlier state (a snapshot, a replica), in which they were still held.
-- #flags allow-oom
-- #include _time _lines _kinds _locks _queue _polls _wake _cancel _redelivery _pending
local consumer, known, messages, marks = ARGV[1], {}, {}, nil
local unknown, messages_left, bytes_left = cmsgpack.unpack(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
if unknown[1] then
  local held_key = '$HELD_PREFIX' .. consumer
  local kinds_of, lines = redis.call('HMGET', held_key, unpack(unknown)), {}
  for position, line in ipairs(unknown) do
    lines[#lines + 1], lines[#lines + 2] = line, kinds_of[position] or ''
  end
  release_all(locks_in(lines))
  redis.call('HDEL', held_key, unpack(unknown))
end

local function requeue_message(stream, entry, deliveries)
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  local data = found and data_of(found[2])
  if not data then return end
  local resumed = string.gsub(stream, '$RESUMED_SUFFIX', '') .. '$RESUMED_SUFFIX'
  requeue(stream, entry, deliveries, found[2], resumed, data, field_of(found[2], 'since') or '0')
  remove(stream, entry)
end

for _, held in ipairs(cmsgpack.unpack(ARGV[2])) do known[held] = true end
for position, stream in ipairs(KEYS) do
  local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', 10000, consumer)
  for _, p in ipairs(pending.err and {} or pending) do
    local unknown = not known[stream .. ' ' .. p[1]]
    if unknown and ARGV[6] == '1' then
      requeue_message(stream, p[1], tonumber(p[4]))
    elseif unknown then
      if messages_left <= 0 or bytes_left <= 0 then return {messages, 1} end
      local claimed = redis.call('XCLAIM', stream, '$GROUP', consumer, 0, p[1], 'RETRYCOUNT', p[4])
      if claimed[1] then
        if not messages[1] then marks = any_cancelled() end
        messages_left, bytes_left = messages_left - 1, bytes_left - #(data_of(claimed[1][2]) or '')
        add_delivery(messages, position, with_survivals(stream, claimed[1], p[4]), p[4], marks)
      end
    end
  end
end
return {messages, 0}
