"""Order of test files in `make test`."""

from __future__ import annotations

__all__ = ["LONGEST", "place"]

#: What begins first, so that none of several processes is left alone with one in the end: the longest, by measured
#: time. Those that wait for a batch system take turns with those that compute, for each core to have work.
LONGEST = (
    "ces/test_arc_ce.py",
    "dashboard/test_browser.py",
    "ces/test_htcondor_ce.py",
    "ces/test_htcondor_many.py",
    "logic/test_fair_shares.py",
    "ces/test_slurm_ce.py",
    "acceptance/test_migration.py",
    "db/test_query_plans.py",
    "ces/test_batch_ce.py",
    "acceptance/test_schema_version.py",
    "dashboard/test_actions.py",
    "locks/test_exclusion.py",
    "acceptance/test_demo.py",
    "ces/test_ssh_ce.py",
    "acceptance/test_metrics_across_versions.py",
    "cli/test_dlq.py",
    "cli/test_blocked_worker.py",
    "test_pilot_pages_browser.py",
    "routers/test_my_pilots_api.py",
    "acceptance/test_demo_slurm.py",
    "logic/test_pilot_registry.py",
    "test_sizes_of_calls.py",
    "cli/test_dev.py",
    "ces/test_pilot_script.py",
    "acceptance/test_docs.py",
    "api/test_generated_client.py",
    "cli/test_processes.py",
    "acceptance/test_locks_across_versions.py",
    "acceptance/test_delivery_model.py",
    "web/test_any_input.py",
    "broker/test_broker_model.py",
    "logic/test_missing_pilots.py",
)
_FOLDERS = ("/integration/ces/", "/acceptance/", "/integration/", "")


def place(name: str) -> tuple[int, int]:
    """Key to sort tests by, whose files and folders are in their names."""
    longest = next((n for n, file in enumerate(LONGEST) if f"{file}::" in name), len(LONGEST))
    return longest, next(n for n, folder in enumerate(_FOLDERS) if folder in name)
