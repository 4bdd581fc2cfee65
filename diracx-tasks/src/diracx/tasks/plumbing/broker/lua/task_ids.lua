-- The ids of the tasks in a part of a stream. Changes nothing.
-- KEYS: the stream. ARGV: where to begin (`-`, or `(` and an entry), the most entries to look at.
-- Returns the last entry looked at, or '' when there are no more, then the ids.
-- #include _cancel
local found, last = {''}, ''
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])) do
  found[#found + 1] = task_of(data_of(entry[2]))
  last = entry[1]
end
found[1] = last
return found
