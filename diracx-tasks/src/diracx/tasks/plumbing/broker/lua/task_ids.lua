-- The ids of the tasks in a part of a stream. Changes nothing.
-- KEYS: the stream. ARGV: where to begin (`-`, or `(` and an entry), the most entries to look at, the most bytes (but
--   for what is larger alone).
-- Returns the last entry looked at, or '' when there are no more, then the ids.
-- #flags no-writes
-- #include _cancel _entries
local found = {''}
found[1] = look_at_entries(KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), function(task)
  found[#found + 1] = task
end)
return found
