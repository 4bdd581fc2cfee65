-- Reads the holders of locks, and the number of waiting tasks.
-- KEYS: none. ARGV: locks (msgpack list of {key, kind, window_us or nil}), limit of holders.
-- Returns a msgpack list: for each lock {held, waiters, ends in ms or -1, kind, {owner, ends (µs) or 0, …}};
-- for a rate limiter, `held` is the spent quota and `ends in` the time until all of it is available again.
-- #flags no-writes
-- #include _time _lines
local now, at_most, found = now_us(), tonumber(ARGV[2]), {}
-- For each kind of lock: number of holders, ms to its expiry or -1, kind, {owner, ends (µs) or 0, …}. Not in _kinds.lua:
-- a script defines its functions again in each run.
local inspectors = {}

function inspectors.mutex(lock)
  local owner = redis.call('GET', lock.key)
  return owner and 1 or 0, redis.call('PTTL', lock.key), 'mutex', owner and {owner, '0'} or {}
end

function inspectors.exclusive(lock)
  local writer = redis.call('HGET', lock.key, 'writer_owner')
  if writer then return 1, redis.call('PTTL', lock.key), 'exclusive', {writer, '0'} end
  local readers, fields = {}, redis.call('HSCAN', lock.key, 0, 'COUNT', at_most)[2]
  for field = 1, #fields, 2 do
    local owner = string.match(fields[field], '^reader:(.*)$')
    if owner and #readers < 2 * at_most then
      readers[#readers + 1] = owner
      readers[#readers + 1] = '0'
    end
  end
  return tonumber(redis.call('HGET', lock.key, 'readers') or 0), -1, 'shared', readers
end
inspectors.shared = inspectors.exclusive -- one key for both sides

function inspectors.concurrency(lock)
  local from = '(' .. in_ms(now)
  local owners = redis.call('ZRANGEBYSCORE', lock.key, from, '+inf', 'WITHSCORES', 'LIMIT', 0, at_most)
  for score = 2, #owners, 2 do owners[score] = int(1000 * tonumber(owners[score])) end
  local last = redis.call('ZRANGE', lock.key, -1, -1, 'WITHSCORES')[2]
  local left = last and math.ceil(tonumber(last) - now / 1000) or -1
  return redis.call('ZCOUNT', lock.key, from, '+inf'), left, 'concurrency', owners
end

function inspectors.rate(lock)
  local from = lock.window_us and int(now - lock.window_us) or '-inf'
  local first = redis.call('ZRANGEBYSCORE', lock.key, from, '+inf', 'LIMIT', 0, 1)[1]
  if not first then return 0, -1, 'rate', {} end
  local last = redis.call('ZRANGE', lock.key, -1, -1, 'WITHSCORES')
  local total, units = string.match(first, '^(%d+):(%d+):')
  local newest = string.match(last[1], '^(%d+):')
  local left = lock.window_us and math.ceil((tonumber(last[2]) + lock.window_us - now) / 1000) or -1
  return tonumber(newest) - tonumber(total) + tonumber(units), left, 'rate', {}
end

for position, lock in ipairs(cmsgpack.unpack(ARGV[1])) do
  local held, left, kind, holders = inspectors[lock.kind](lock)
  local waiting = 0
  for _, line in ipairs({of_all_sizes('$WAITING_PREFIX', lock.key)}) do waiting = waiting + redis.call('ZCARD', line) end
  found[position] = {held, waiting, left, kind, holders}
end
return cmsgpack.pack(found)
