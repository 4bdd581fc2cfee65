-- Put messages into a stream, all of them or none.
-- KEYS: none: the right to read the stream is asked of a caller that declares it, and a submitter needs it not.
-- ARGV: the stream, the messages. Returns how many.
for position = 2, #ARGV do redis.call('XADD', ARGV[1], '*', 'data', ARGV[position]) end
return #ARGV - 1
