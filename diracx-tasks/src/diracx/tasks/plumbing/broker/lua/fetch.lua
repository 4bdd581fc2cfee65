-- Reserves messages for the free slots of a worker, in the order of the given streams.
-- KEYS: the streams, most urgent first. ARGV: consumer, number of free slots,
--   the consumer's lease (ms), 0 if it has none; and optionally, for each stream, an id up to which all is delivered.
-- Returns {messages (see add_delivery() in _cancel.lua), last ids}: without messages, the last id of each stream, from
-- which to wait; '' for a stream whose given id is still valid. Creates the consumer group of a stream without one (a
-- new stream, or after FLUSHALL), from its first entry, as a blocking read needs stream and group. It also creates the
-- worker's own stream, whose deletion ends its blocking read.
-- #flags allow-oom
-- #include _time _alive _cancel
local WAIT_MS = 86400000 -- when it has expired, the blocking read fails, and a fetch follows
local news
if ARGV[4] then
  local arguments = {'COUNT', 1, 'STREAMS'}
  for _, stream in ipairs(KEYS) do arguments[#arguments + 1] = stream end
  for position = 1, #KEYS do arguments[#arguments + 1] = ARGV[3 + position] end
  local found = redis.call('XREAD', unpack(arguments))
  if not found then return {{}, {}} end
  news = {}
  for _, each in ipairs(found) do news[each[1]] = true end
end
local messages, free, marks = {}, tonumber(ARGV[2]), nil
for position, stream in ipairs(KEYS) do
  if free <= 0 then break end
  local reply = not news or news[stream]
  if reply then
    reply = redis.pcall('XREADGROUP', 'GROUP', '$GROUP', ARGV[1], 'COUNT', free, 'STREAMS', stream, '>')
  end
  if reply and reply.err then
    local no_group = string.find(reply.err, 'NOGROUP', 1, true)
    -- A key of the wrong type has no messages: go on with the other streams.
    if not no_group and not string.find(reply.err, 'WRONGTYPE', 1, true) then return reply end
    reply = false
    if no_group then
      redis.call('XGROUP', 'CREATE', stream, '$GROUP', '0', 'MKSTREAM')
      reply = redis.call('XREADGROUP', 'GROUP', '$GROUP', ARGV[1], 'COUNT', free, 'STREAMS', stream, '>')
    end
  end
  if reply and #messages == 0 then
    marks = any_cancelled()
    ensure_alive(ARGV[1], tonumber(ARGV[3]), now_us())
  end
  for _, entry in ipairs(reply and reply[1][2] or {}) do
    add_delivery(messages, position, entry, 1, marks)
    free = free - 1
  end
end
local last_ids = {}
if #messages == 0 then
  if not news then
    redis.pcall('XGROUP', 'CREATE', '$WAIT_PREFIX' .. ARGV[1], '$GROUP', '0', 'MKSTREAM')
    redis.call('PEXPIRE', '$WAIT_PREFIX' .. ARGV[1], WAIT_MS)
  end
  for position, stream in ipairs(KEYS) do
    last_ids[position] = ''
    if not news or news[stream] then
      local info = redis.pcall('XINFO', 'STREAM', stream)
      if info.err then last_ids[position] = '0-0' end
      for field = 1, info.err and 0 or #info, 2 do
        if info[field] == 'last-generated-id' then last_ids[position] = info[field + 1] end
      end
    end
  end
end
return {messages, last_ids}
