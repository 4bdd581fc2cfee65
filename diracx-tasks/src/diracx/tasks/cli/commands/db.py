"""`db`: migrate the database of dead letters."""

from __future__ import annotations

from ..migrations import add_migration_commands
from ..options import command_group
from ..runtime.databases import NO_TASK_DB

app = command_group(
    "db",
    "Migrate the database of dead letters, DIRACX_DB_URL_TASKDB.\n\n"
    "A new version of diracx-tasks may need new columns or indexes: `current` shows pending migrations, `upgrade` "
    "applies them and keeps all rows, `downgrade` reverts them before an older version is installed. Needs the "
    "extra \\[migrations].",
)
add_migration_commands(app, "diracx-task-run db", "TaskDB", NO_TASK_DB)
