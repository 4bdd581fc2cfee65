-- The line of a lock is the queue of the tasks that wait for it. It has a part for each size of task, for there may be
-- no worker of one size.
local EACH_SIZE = {'small', 'medium', 'large'}
local function of_all_sizes(prefix, lock)
  return prefix .. 'small:' .. lock, prefix .. 'medium:' .. lock, prefix .. 'large:' .. lock
end

local function size_of(stream)
  return string.match(stream, '^diracx:tasks:%l+:(%l+)')
end
