-- Look for cancelled tasks in a part of a stream: those that have a mark. Changes nothing.
-- KEYS: the stream. ARGV: where to begin (`-`, or `(` and an entry), the most entries to look at, the most bytes (but
--   for what is larger alone).
-- Returns {the last entry looked at, or '' when there are no more; list of {task, entry, message}}.
-- #flags no-writes
-- #include _cancel _entries
local found, tasks, places = {}, {}, {}
local last = look_at_entries(KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), function(task, entry, data)
  tasks[#tasks + 1] = task
  places[#places + 1] = {task, entry, data}
end)
local marks = tasks[1] and redis.call('ZMSCORE', '$CANCELLED', unpack(tasks)) or {}
for position, place in ipairs(places) do
  if marks[position] then found[#found + 1] = place end
end
return {last, found}
