"""Order of test files in `make test`."""

from __future__ import annotations

__all__ = ["LONGEST", "place"]

#: What begins first, so that none of several processes is left alone with one in the end: the longest, by measured
#: time. Those that wait for a batch system take turns with those that compute, for each core to have work.
LONGEST = (
    "acceptance/test_migration.py",
    "ces/test_arc_ce.py",
    "ces/test_slurm_ce.py",
    "acceptance/test_demo.py",
    "ces/test_htcondor_ce.py",
    "logic/test_fair_shares.py",
    "ces/test_ssh_ce.py",
    "acceptance/test_metrics_across_versions.py",
    "ces/test_batch_ce.py",
    "cli/test_dlq.py",
    "routers/test_my_pilots_api.py",
    "cli/test_config_changes.py",
    "test_pilot_pages_browser.py",
    "acceptance/test_schema_version.py",
    "cli/test_processes.py",
    "ces/test_htcondor_many.py",
    "dashboard/test_browser.py",
    "locks/test_exclusion.py",
    "cli/test_blocked_worker.py",
    "worker/test_lost_replies.py",
    "acceptance/test_demo_slurm.py",
    "ces/test_slurm_failures.py",
    "dashboard/test_actions.py",
    "test_redis_outages.py",
    "logic/test_pilot_registry.py",
    "ces/test_pilot_script.py",
    "test_sizes_of_calls.py",
    "persistence/test_dead_letters.py",
    "db/test_my_pilot_db.py",
    "cli/test_hard_limit.py",
    "cli/test_dev.py",
    "db/test_schema.py",
    "web/test_any_input.py",
    "cli/test_fail_over.py",
    "logic/test_missing_pilots.py",
    "db/test_query_plans.py",
    "broker/test_broker_model.py",
    "ces/test_ssh_shell.py",
    "auth/test_sign_in_browser.py",
    "logic/test_submission_limits.py",
    "unit/test_clock_changes.py",
    "acceptance/test_redis_acl.py",
    "acceptance/test_delivery_model.py",
    "acceptance/test_locks_across_versions.py",
    "unit/test_schedules.py",
    "acceptance/test_docs.py",
)
_FOLDERS = ("/integration/ces/", "/acceptance/", "/integration/", "")


def place(name: str) -> tuple[int, int]:
    """Key to sort tests by, whose files and folders are in their names."""
    longest = next((n for n, file in enumerate(LONGEST) if f"{file}::" in name), len(LONGEST))
    return longest, next(n for n, folder in enumerate(_FOLDERS) if folder in name)
