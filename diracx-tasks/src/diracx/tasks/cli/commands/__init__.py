"""One module per command, or command group, of `diracx-task-run`.

To add a command, write a function here and register it in `diracx.tasks.cli`. Its docstring is its help and ends
with an example; its parameters are its options. The fields of a dataclass parameter (`Server`, `ServerAndTasks`)
are options, too; these two connect to the broker. `show` prints lists with the columns of a view in
`diracx.tasks.operations.views`. A module is imported when one of its commands runs. Import at its top, except
SQLAlchemy and FastAPI, which take a second: import these in functions.
"""
