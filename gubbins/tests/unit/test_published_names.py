"""Compatibility with names and defaults of the published extension."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diracx.tasks.plumbing import Size

import gubbins
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.my_pilot_db import db, schema
from gubbins.tasks.my_pilots import MyPilotTask, MySubmitPilotsTask


def test_modules_of_the_database_are_importable() -> None:
    assert db.MyPilotDB is MyPilotDB
    assert schema.Base.metadata is MyPilotDB.metadata
    assert {schema.MyComputeElements.__table__, schema.MyPilotSubmissions.__table__} <= set(
        schema.Base.metadata.sorted_tables
    )
    assert [str(state) for state in schema.MyPilotStatus] == ["SUBMITTED", "RUNNING", "DONE", "FAILED"]


def test_pilots_are_submitted_by_small_workers() -> None:
    assert MyPilotTask.size is Size.SMALL


@pytest.mark.parametrize(
    ("task", "values"),
    [
        (MySubmitPilotsTask("lhcb"), ("lhcb",)),
        (MySubmitPilotsTask("lhcb", compute_elements=["a"]), ("lhcb", ["a"], None)),
        (MySubmitPilotsTask("lhcb", all_but=[]), ("lhcb", None, [])),
    ],
)
def test_a_round_of_all_compute_elements_has_the_vo_as_its_only_argument(
    task: MySubmitPilotsTask, values: tuple
) -> None:
    assert task.serialize() == values


@pytest.mark.parametrize("beside", [True, False])
def test_import_is_refused_where_the_example_extension_is_installed(tmp_path: Path, beside: bool) -> None:
    shutil.copy(gubbins.__file__, (tmp_path / "gubbins").mkdir() or tmp_path / "gubbins")
    if beside:
        (tmp_path / "gubbins" / "core").mkdir()
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gubbins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ("uninstall both, then install gubbins-pilots again" in done.stderr) is beside
    assert (done.returncode != 0) is beside
