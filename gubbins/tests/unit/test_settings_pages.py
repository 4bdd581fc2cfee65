"""The pages about compute elements are complete, and name settings and tests that exist."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel
from support.paths import ROOT

from gubbins.ces.arc.settings import ArcSettings
from gubbins.ces.batch.settings import BatchSettings
from gubbins.ces.htcondor.settings import HTCondorSettings
from gubbins.ces.local import LocalSettings
from gubbins.ces.registry import available_backends, load_backend
from gubbins.ces.simulated import SimulatedSettings
from gubbins.ces.slurm.settings import SlurmSettings
from gubbins.ces.ssh import SSHSettings
from gubbins.ces.transports.tokens import TokenIssuer
from gubbins.cli.app import ce_app
from gubbins.db.sql import MyPilotDB
from gubbins.domain.rules import CERules
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.ce_file import CESpec

HOW_TO = ROOT / "docs/how-to"


PAGES: dict[str, list[type[BaseModel]]] = {
    "connect-a-ce.md": [CESpec, CERules, TokenIssuer, SimulatedSettings, LocalSettings],
    "connect-an-arc-ce.md": [ArcSettings],
    "connect-a-batch-system.md": [BatchSettings],
    "connect-an-htcondor-site.md": [HTCondorSettings],
    "connect-a-slurm-site.md": [SlurmSettings],
    "connect-with-ssh.md": [SSHSettings],
}


def test_every_back_end_is_documented_and_in_the_help() -> None:
    documented = {model for models in PAGES.values() for model in models}
    [text] = [command.help for command in ce_app.registered_commands if command.name == "load"]
    assert text is not None
    for name in available_backends():
        assert load_backend(name).Settings in documented, f"name a page with the settings of `{name}` in PAGES"
        assert re.search(rf"\b{name}\b", text), f"name the back end `{name}` in the help of `gubbins ce load`"


@pytest.mark.parametrize(("page", "models"), PAGES.items())
def test_every_setting_is_documented_and_every_documented_setting_exists(
    page: str, models: list[type[BaseModel]]
) -> None:
    text = (HOW_TO / page).read_text()
    fields = {name for model in models for name in model.model_fields}
    assert {name for name in fields if f"`{name}`" not in text} == set()
    tables = re.findall(
        r"^\| (?:setting|rule|field|`token`) \| default.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE
    )
    rows = [row.split("|")[1] for table in tables for row in table.splitlines()]
    named = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 5
    assert named <= fields


def test_every_test_of_tested_site_behaviour_exists() -> None:
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (ROOT / "docs/reference/back-ends.md").read_text()))
    sources = [*(ROOT / "gubbins").rglob("test_*.py"), ROOT / "gubbins/src/gubbins/testing/ce_conformance.py"]
    found = {name for source in sources for name in re.findall(r"def (test_\w+)", source.read_text())}
    assert len(named) > 20
    assert named - found - {source.stem for source in sources} == set()


def test_the_reference_has_every_module_of_the_logic_and_the_database() -> None:
    shown = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/reference/gubbins.md").read_text(), re.MULTILINE))
    exported = {getattr(getattr(logic, name), "__module__", "") for name in logic.__all__}
    parts = exported | {each.__module__ for each in MyPilotDB.__mro__}
    own = {each for each in parts if each.startswith(("gubbins.logic", "gubbins.db"))}
    assert len(own) > 10
    assert {each for each in own if each not in shown and each.rpartition(".")[0] not in shown} == set()
