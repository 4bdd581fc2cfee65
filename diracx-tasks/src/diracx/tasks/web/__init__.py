"""HTTP: the dashboard (`dashboard`) and the interface `/api/tasks` of a DiracX application (`api`)."""
