"""The task system in the DiracX application: the HTTP interface `/api/tasks/…` and the dashboard below it."""
