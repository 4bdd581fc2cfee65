-- Submits the callback of a group now, in any state of its children, and deletes the group.
-- KEYS: none. ARGV: group id. Returns 1; 0 if the group does not exist, as in a second call.
-- #include _time _lines _queue _groups
return fire(ARGV[1], true)
