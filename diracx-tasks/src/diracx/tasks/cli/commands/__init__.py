"""One module per command of `diracx-task-run`, or per group of commands.

To add a command, write a function here and register it in `diracx.tasks.cli`. Its docstring is its help, with an
example; its parameters are its options. A dataclass parameter (`Server`, `ServerAndTasks`) stands for the options
that are its fields, and leads to the broker. What it lists is printed by `show`, with the columns of a
view in `diracx.tasks.operations.views`. Import here what is cheap, and in the function what loads Redis or SQL.
"""
