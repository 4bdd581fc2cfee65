-- Adds messages to a stream, all of them or none.
-- KEYS: none, for a declared key requires the right to read it, which a submitter need not have.
-- ARGV: the stream, the messages. Returns their number.
for position = 2, #ARGV do redis.call('XADD', ARGV[1], '*', 'data', ARGV[position]) end
return #ARGV - 1
