-- Look for tasks in a part of a stream. Changes nothing.
-- KEYS: the stream. ARGV: where to begin (`-`, or `(` and an entry), the most entries to look at,
--   task ids (msgpack list).
-- Returns {the last entry looked at, or '' when there are no more; list of {task, entry, message}}.
-- #include _cancel
local wanted, found, last = {}, {}, ''
for _, task in ipairs(cmsgpack.unpack(ARGV[3])) do wanted[task] = true end
local entries = redis.pcall('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])
for _, entry in ipairs(entries.err and {} or entries) do -- nothing comes after the last of all ids
  local data = data_of(entry[2])
  local task = task_of(data)
  if task and wanted[task] then found[#found + 1] = {task, entry[1], data} end
  last = entry[1]
end
return {last, found}
