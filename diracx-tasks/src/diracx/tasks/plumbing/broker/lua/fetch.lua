-- Reserve as many messages as there are free slots, in the order of the given streams.
-- KEYS: the streams, most urgent first. ARGV: consumer, number of free slots,
--   the consumer's lease (ms), 0 if it has none; and an id for each stream, if all up to those has been delivered.
-- Returns {messages (see hand_out() in _cancel.lua), last ids}: the last ids are given only when there was nothing,
-- as the place from which to wait for something new; '' for a stream of which the given one still holds.
-- A stream without a group (new, written before any worker, or after FLUSHALL) gets it here, from the very first entry:
-- who waits for messages of a group needs both. So it has the worker's own stream, which is deleted to end its wait.
-- #flags allow-oom
-- #include _time _alive _cancel
local WAIT_MS = 86400000 -- without it, a wait is refused, and a fetch follows
local news
if ARGV[4] then
  local looked = {'COUNT', 1, 'STREAMS'}
  for _, stream in ipairs(KEYS) do looked[#looked + 1] = stream end
  for position = 1, #KEYS do looked[#looked + 1] = ARGV[3 + position] end
  local found = redis.call('XREAD', unpack(looked))
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
    -- A key of another type has no messages, and those of the other streams must not wait for it.
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
    hand_out(messages, position, entry, 1, marks)
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
