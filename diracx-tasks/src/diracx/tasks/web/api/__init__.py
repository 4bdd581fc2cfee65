"""HTTP API of the task system in the DiracX application, `/api/tasks/…`, and the dashboard below it."""
