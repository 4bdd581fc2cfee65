-- The ids of the tasks in a part of a stream. Changes nothing.
-- KEYS: the stream. ARGV: where to begin (`-`, or `(` and an entry), the most entries to look at.
-- Returns the last entry looked at, or '' when there are no more, then the ids.
-- #flags no-writes
-- #include _cancel
local found, last = {''}, ''
local entries = redis.pcall('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
for _, entry in ipairs(entries.err and {} or entries) do -- nothing comes after the last of all ids
  found[#found + 1] = task_of(data_of(entry[2]))
  last = entry[1]
end
found[1] = last
return found
