"""Business logic of pilots and compute elements; the only layer that uses `MyPilotDB`.

Each function can be called inside a transaction (`async with db:`) or outside one. Outside, it uses short
transactions of its own, and none is open during calls to a compute element.
"""

from __future__ import annotations

__all__ = [
    "CE_NAME",
    "CEFileError",
    "CERules",
    "CESpec",
    "DemandPolicy",
    "MyPilotStatus",
    "PilotSubmissionError",
    "Reconciliation",
    "VORules",
    "add_ce",
    "add_downtime",
    "ban_ce",
    "cancel_pilot",
    "ces_in_downtime",
    "collect_outputs",
    "count_ended_pilots",
    "count_illegal_histories",
    "count_pilots",
    "count_reports",
    "count_steps",
    "count_waiting_jobs",
    "count_without_work",
    "exchange_secret",
    "get_available_ces",
    "get_ce",
    "get_pilot",
    "get_pilot_output",
    "get_pilot_summary",
    "import_dirac",
    "import_downtimes",
    "jobs_of_pilot",
    "list_ces",
    "list_downtimes",
    "load_ces",
    "parse_ce_file",
    "prune_pilots",
    "read_task_queues",
    "reconcile_registry",
    "record_report",
    "redact_ce",
    "refresh_token",
    "remove_downtime",
    "request_pilots",
    "search_pilots",
    "set_ce_enabled",
    "stamps_of_job",
    "submit_pilot",
    "submit_requested_pilot",
    "transition_pilot_states",
    "update_registry",
    "withdraw_requests",
    "write_registry_outputs",
]

from gubbins.domain.exceptions import CEFileError, PilotSubmissionError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.rules import CERules, DemandPolicy, VORules

from .ce_file import CE_NAME, CESpec, parse_ce_file
from .check import transition_pilot_states
from .compute_elements import (
    add_ce,
    ban_ce,
    get_available_ces,
    get_ce,
    list_ces,
    load_ces,
    redact_ce,
    set_ce_enabled,
)
from .demand import request_pilots, withdraw_requests
from .dirac_import import import_dirac
from .downtimes import add_downtime, ces_in_downtime, import_downtimes, list_downtimes, remove_downtime
from .identity import exchange_secret, record_report, refresh_token
from .outputs import collect_outputs, get_pilot_output
from .pilots import (
    cancel_pilot,
    count_ended_pilots,
    count_illegal_histories,
    count_pilots,
    count_reports,
    count_steps,
    count_without_work,
    get_pilot,
    get_pilot_summary,
    prune_pilots,
    search_pilots,
)
from .registry import (
    Reconciliation,
    jobs_of_pilot,
    reconcile_registry,
    stamps_of_job,
    update_registry,
    write_registry_outputs,
)
from .requested import submit_requested_pilot
from .submission import submit_pilot
from .waiting_jobs import count_waiting_jobs, read_task_queues
