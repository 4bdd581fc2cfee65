-- Bring the set of schedules up to date. Only the leader may.
-- KEYS: none. ARGV: leader's token, schedules (msgpack list of {id, due, fingerprint}).
-- A schedule whose rule has not changed keeps its next run; a new or changed one gets the given one; one that
-- is not in the list is forgotten. Returns 1, or 0 when somebody else leads.
-- #include _time
if redis.call('GET', '$LEADER') ~= ARGV[1] then return 0 end
local wanted = {}
for _, s in ipairs(cmsgpack.unpack(ARGV[2])) do
  wanted[s.id] = true
  if redis.call('HGET', '$FINGERPRINTS', s.id) ~= s.fingerprint then
    redis.call('HSET', '$FINGERPRINTS', s.id, s.fingerprint)
    redis.call('ZADD', '$NEXT_RUNS', int(s.due), s.id)
  end
end
for _, id in ipairs(redis.call('HKEYS', '$FINGERPRINTS')) do
  if not wanted[id] then
    redis.call('HDEL', '$FINGERPRINTS', id)
    redis.call('HDEL', '$LAST_RUNS', id)
    redis.call('ZREM', '$NEXT_RUNS', id)
  end
end
return 1
