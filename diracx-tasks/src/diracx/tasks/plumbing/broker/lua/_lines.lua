-- A line has a part for each size, for it may be that no worker takes tasks of one of them.
local EACH_SIZE = {'small', 'medium', 'large'}
local function of_all_sizes(prefix, lock)
  return prefix .. 'small:' .. lock, prefix .. 'medium:' .. lock, prefix .. 'large:' .. lock
end

local function size_of(stream)
  return string.match(stream, '^diracx:tasks:%l+:(%l+)')
end
