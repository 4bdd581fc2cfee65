-- Bring the schedules up to date. Only the leader may.
-- KEYS: none. ARGV: leader's token, new or changed schedules (msgpack list of {id, fingerprint, due}; without a due
--   time the rule has come to its end), ids of those that are unchanged, ids of those that are switched off.
-- What is unchanged keeps its next run. What is switched off has none, and its history is kept. Everything else is
-- forgotten, but for the pauses. Returns 1, or 0 when somebody else leads.
-- #flags allow-oom
-- #include _time
if redis.call('GET', '$LEADER') ~= ARGV[1] then return 0 end
local on, known = {}, {}
for _, s in ipairs(cmsgpack.unpack(ARGV[2])) do
  on[s.id], known[s.id] = true, true
  redis.call('HSET', '$FINGERPRINTS', s.id, s.fingerprint)
  if s.due then
    redis.call('ZADD', '$NEXT_RUNS', int(s.due), s.id)
  else
    redis.call('ZREM', '$NEXT_RUNS', s.id)
  end
end
for _, id in ipairs(cmsgpack.unpack(ARGV[3])) do on[id], known[id] = true, true end
for _, id in ipairs(cmsgpack.unpack(ARGV[4])) do known[id] = true end
for _, id in ipairs(redis.call('ZRANGE', '$NEXT_RUNS', 0, -1)) do
  if not on[id] then redis.call('ZREM', '$NEXT_RUNS', id) end
end
for _, id in ipairs(redis.call('HKEYS', '$FINGERPRINTS')) do
  if not on[id] then redis.call('HDEL', '$FINGERPRINTS', id) end
end
for _, key in ipairs({'$LAST_RUNS', '$OUTCOMES', '$PROBLEMS'}) do
  for _, id in ipairs(redis.call('HKEYS', key)) do
    if not known[id] then redis.call('HDEL', key, id) end
  end
end
return 1
