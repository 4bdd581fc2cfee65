"""Web interfaces: the dashboard (`dashboard`) and the HTTP API `/api/tasks` of a DiracX application (`api`)."""
