-- Messages of a stream: their task, their entry and their data, one after another as long as there are any, so many
-- at most, and so many bytes (but for what is larger alone).
-- Returns the last entry looked at, or '' when there are no more.
local function look_at_entries(stream, first, at_most, bytes_left, look)
  local last = ''
  for _ = 1, at_most do
    if bytes_left <= 0 then break end
    local found = redis.pcall('XRANGE', stream, first, '+', 'COUNT', 1)
    local entry = not found.err and found[1] -- nothing comes after the last of all ids
    if not entry then break end
    local data = data_of(entry[2])
    local task = task_of(data)
    if task then look(task, entry[1], data) end
    first, last, bytes_left = '(' .. entry[1], entry[1], bytes_left - #(data or '')
  end
  return last
end
