-- Put messages into a stream, all of them or none.
-- KEYS: the stream. ARGV: the messages. Returns how many.
for _, data in ipairs(ARGV) do redis.call('XADD', KEYS[1], '*', 'data', data) end
return #ARGV
