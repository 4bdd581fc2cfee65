-- Calls `call` with the values of a list in parts, for Lua passes at most about 8,000 values per call. Pairs stay
-- together.
local function in_parts(values, call)
  for from = 1, #values, 1000 do call(unpack(values, from, math.min(from + 999, #values))) end
end
