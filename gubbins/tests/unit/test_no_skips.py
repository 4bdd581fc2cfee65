"""With NO_SKIPS in the environment, what is missing fails; what only another machine could have does not."""

from __future__ import annotations

import pytest
from support.paths import ROOT

pytest_plugins = ["pytester"]

BINDINGS = "monkeypatch.setattr(site.importlib.util, 'find_spec', lambda name: None)"
FORBIDDEN = "monkeypatch.setattr(site, 'check', lambda: raises(ForbiddenError('no mount namespaces')))"
NOT_FETCHED = "monkeypatch.setattr(root, 'ROOT', root.Path('/none/a'))"
NOT_SERVED = "monkeypatch.setattr(root, 'not_served', lambda path: 'release not served')"
SKIP = "pytest.skip('not installed')"


@pytest.mark.parametrize(
    ("obstacles", "outcome"),
    [
        (["monkeypatch.setattr(site, 'check', lambda: None)", BINDINGS], "errors"),
        (["monkeypatch.setattr(root, '_check_machine', lambda: None)", NOT_FETCHED], "errors"),
        (["monkeypatch.setattr(root, '_check_machine', lambda: None)", NOT_FETCHED, NOT_SERVED], "skipped"),
        ([FORBIDDEN, BINDINGS], "skipped"),
        ([SKIP], "errors"),
    ],
    ids=["bindings missing", "daemons not fetched", "release not served", "forbidden", "any other skip"],
)
def test_only_tests_of_unavailable_software_may_be_skipped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, obstacles: list[str], outcome: str
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("NO_SKIPS", "1")
    pytester.makeini(f"[pytest]\npythonpath = {ROOT / 'tests'}\naddopts = -p support.sites.htcondor")
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    lines = "\n    ".join(obstacles)
    pytester.makepyfile(f"""
import pytest, support.sites.htcondor as site, support.sites.htcondor_root as root
from support.sites.debian_root import ForbiddenError

def raises(error):
    raise error

@pytest.fixture(scope="session")
def obstacles():
    monkeypatch = pytest.MonkeyPatch()
    {lines}
    yield
    monkeypatch.undo()

@pytest.mark.parametrize("number", [1, 2])
def test_pool(number, obstacles, htcondor_site):
    assert False, "it is not there"
""")
    pytester.runpytest_inprocess().assert_outcomes(**{outcome: 2})
