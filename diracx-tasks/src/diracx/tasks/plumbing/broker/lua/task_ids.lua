-- Lists the ids of the tasks in a part of a stream. Changes nothing.
-- KEYS: the stream. ARGV: start (`-`, or `(` and an entry), limit of entries, limit of bytes (one larger message is
--   allowed).
-- Returns the last examined entry, or '' at the end of the stream, then the ids.
-- #flags no-writes
-- #include _cancel _entries
local found = {''}
found[1] = visit_entries(KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), function(task)
  found[#found + 1] = task
end)
return found
