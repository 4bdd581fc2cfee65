-- Updates planned schedules, for the leader only.
-- KEYS: none. ARGV: leader's token, schedules (msgpack list of {id} with
--   fingerprint, due (ms): it is new or has changed; without a due time its rule has no further run;
--   neither: it is disabled, or, with forgotten = 1, deleted).
-- A disabled schedule has no next run, and keeps its history. Of a deleted one only its pause is kept, and its last
-- occurrence until that has ended: if the schedule comes back before, no second occurrence is submitted meanwhile.
-- Returns 1, or 0 when another scheduler leads.
-- #flags allow-oom
-- #include _time _schedules
if redis.call('GET', '$LEADER') ~= ARGV[1] then return 0 end
local forgotten = {}
for _, s in ipairs(cmsgpack.unpack(ARGV[2])) do
  if s.fingerprint then
    redis.call('HSET', '$FINGERPRINTS', s.id, s.fingerprint)
  else
    redis.call('HDEL', '$FINGERPRINTS', s.id)
  end
  if s.due then
    redis.call('ZADD', '$NEXT_RUNS', int(s.due), s.id)
  else
    redis.call('ZREM', '$NEXT_RUNS', s.id)
  end
  if s.forgotten then forgotten[#forgotten + 1] = s.id end
end
if forgotten[1] then
  for _, key in ipairs({'$OUTCOMES', '$PROBLEMS'}) do redis.call('HDEL', key, unpack(forgotten)) end
  for position, last in ipairs(redis.call('HMGET', '$LAST_RUNS', unpack(forgotten))) do
    if last and not state_of(last) then redis.call('HDEL', '$LAST_RUNS', forgotten[position]) end
  end
end
return 1
