"""`gubbins demo`: the whole pilot system on this machine, from an empty directory, for looking at."""
