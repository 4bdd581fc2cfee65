"""One module per command of `diracx-task-run`, or per group of commands.

To add a command, write a function here and name it in `diracx.tasks.cli`. Its docstring is its help, with an
example; its parameters are its options. A dataclass parameter (`Server`, `ServerAndTasks`) stands for the options
that are its fields, and leads to the broker. What it lists is printed by `show`, with the columns of a view in
`diracx.tasks.operations.views`. A module is imported when one of its commands is run: what commands need stands at
its top, but for SQLAlchemy and FastAPI, which take a second and are imported where a database or a page is opened.
"""
