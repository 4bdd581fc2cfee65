"""`db`: take the database of dead letters to the revision that this version of the software needs."""

from __future__ import annotations

from ..migrations import add_migration_commands
from ..options import command_group
from ..runtime.databases import NO_TASK_DB

app = command_group(
    "db",
    "The schema of the database of dead letters, DIRACX_DB_URL_TASKDB.\n\n"
    "A new version of diracx-tasks may need new columns or indexes: `current` tells, `upgrade` adds them with all "
    "rows kept, `downgrade` goes back before an older version is installed. Needs the extra "
    "\\[migrations].",
)
add_migration_commands(app, "diracx-task-run db", "TaskDB", NO_TASK_DB)
