-- Bury dead workers and take over what they were running.
-- KEYS: the streams of the caller, most urgent first. ARGV: consumer, number of free slots,
--   1 to look for consumers that are on no list (a registry lost with FLUSHALL), every stream (msgpack list),
--   lease (ms): how long such a consumer may still be silent.
-- Returns messages as fetch.lua does, each with its delivery count: {stream, entry, fields, deliveries}.
-- Burying gives back the locks a dead worker held, readers included; its consumers go when nothing is left in them.
-- #flags allow-oom
-- #include _time _locks _queue _wake
local consumer, free, messages = ARGV[1], tonumber(ARGV[2]), {}
local every_stream = cmsgpack.unpack(ARGV[4])
if ARGV[3] == '1' then
  for _, stream in ipairs(every_stream) do
    local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, '$GROUP')
    if not consumers.err then
      for _, info in ipairs(consumers) do
        redis.call('ZADD', '$ALIVE', 'NX', int(now_us() / 1000 + tonumber(ARGV[5])), info[2])
      end
    end
  end
end
local dead = redis.call('ZRANGEBYSCORE', '$ALIVE', '-inf', int(now_us() / 1000))
for _, worker in ipairs(dead) do
  if worker ~= consumer then
    local held = redis.call('HVALS', '$HELD_PREFIX' .. worker)
    local locks = {}
    for _, packed in ipairs(held) do
      if packed ~= '' then locks[#locks + 1] = cmsgpack.unpack(packed) end -- '': an entry, see renew.lua
    end
    redis.call('DEL', '$HELD_PREFIX' .. worker)
    release_all(locks)
    for position, stream in ipairs(KEYS) do
      local pending = free > 0 and redis.pcall('XPENDING', stream, '$GROUP', '-', '+', free, worker) or {}
      for _, p in ipairs(pending.err and {} or pending) do
        local claimed = redis.call('XCLAIM', stream, '$GROUP', consumer, 0, p[1])
        if claimed[1] then
          messages[#messages + 1] = {position, claimed[1][1], claimed[1][2], tonumber(p[4]) + 1}
          free = free - 1
        end
      end
    end
    local clean = true
    for _, stream in ipairs(every_stream) do
      local pending = redis.pcall('XPENDING', stream, '$GROUP', '-', '+', 1, worker)
      if not pending.err then
        if pending[1] then
          clean = false
        else
          redis.call('XGROUP', 'DELCONSUMER', stream, '$GROUP', worker)
        end
      end
    end
    if clean then redis.call('ZREM', '$ALIVE', worker) end
  end
end
return messages
