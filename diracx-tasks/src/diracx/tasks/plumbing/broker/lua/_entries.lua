-- Calls `visit` with task, entry and data of the messages of a stream, up to a number of entries and of bytes (one
-- larger message is allowed).
-- Returns the last examined entry, or '' at the end of the stream.
local function visit_entries(stream, first, at_most, bytes_left, visit)
  local last = ''
  for _ = 1, at_most do
    if bytes_left <= 0 then break end
    local found = redis.pcall('XRANGE', stream, first, '+', 'COUNT', 1)
    local entry = not found.err and found[1] -- an error after the greatest possible id
    if not entry then break end
    local data = data_of(entry[2])
    local task = task_of(data)
    if task then visit(task, entry[1], data) end
    first, last, bytes_left = '(' .. entry[1], entry[1], bytes_left - #(data or '')
  end
  return last
end
