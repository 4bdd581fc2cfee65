-- Fire a group now, whatever its children do. Exactly once: a second call finds nothing.
-- KEYS: none. ARGV: group id. Returns 1 when it was fired, else 0.
-- #include _time _lines _queue _groups
return fire(ARGV[1], true)
