-- Lua passes at most about 8,000 values in one call: `call` gets a list part by part. Pairs stay together.
local function in_parts(values, call)
  for from = 1, #values, 1000 do call(unpack(values, from, math.min(from + 999, #values))) end
end
