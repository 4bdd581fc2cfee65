-- Look for cancelled tasks in a part of a stream: those that have a mark. Changes nothing.
-- KEYS: the stream. ARGV: where to begin (`-`, or `(` and an entry), the most entries to look at.
-- Returns {the last entry looked at, or '' when there are no more; list of {task, entry, message}}.
-- #flags no-writes
-- #include _cancel
local found, tasks, places, last = {}, {}, {}, ''
local entries = redis.pcall('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
for _, entry in ipairs(entries.err and {} or entries) do -- nothing comes after the last of all ids
  local data = data_of(entry[2])
  local task = task_of(data)
  if task then
    tasks[#tasks + 1] = task
    places[#places + 1] = {task, entry[1], data}
  end
  last = entry[1]
end
local marks = tasks[1] and redis.call('ZMSCORE', '$CANCELLED', unpack(tasks)) or {}
for position, place in ipairs(places) do
  if marks[position] then found[#found + 1] = place end
end
return {last, found}
