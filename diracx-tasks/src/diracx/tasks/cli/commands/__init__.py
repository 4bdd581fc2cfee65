"""One module per command of `diracx-task-run`, or per group of commands."""
