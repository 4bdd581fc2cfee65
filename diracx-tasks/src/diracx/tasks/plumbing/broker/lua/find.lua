-- Finds tasks with a cancellation mark in a part of a stream. Changes nothing.
-- KEYS: the stream. ARGV: start (`-`, or `(` and an entry), limit of entries, limit of bytes (one larger message is
--   allowed).
-- Returns {the last examined entry, or '' at the end of the stream; list of {task, entry, message}}.
-- #flags no-writes
-- #include _cancel _entries
local found, tasks, places = {}, {}, {}
local last = visit_entries(KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), function(task, entry, data)
  tasks[#tasks + 1] = task
  places[#places + 1] = {task, entry, data}
end)
local marks = tasks[1] and redis.call('ZMSCORE', '$CANCELLED', unpack(tasks)) or {}
for position, place in ipairs(places) do
  if marks[position] then found[#found + 1] = place end
end
return {last, found}
