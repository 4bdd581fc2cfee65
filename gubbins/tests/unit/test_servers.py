"""`make servers` recognises installed servers, and completes missing or partial ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import servers
from support.sites import htcondor_root, redis_versions

Program = Callable[..., Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts shell scripts into an otherwise empty PATH: `program("name", "echo 1.0")`."""
    monkeypatch.setattr(servers, "PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(servers, "POSTGRESQL", tmp_path / "postgresql")

    def write(name: str, script: str, directory: str = "bin") -> Path:
        path = tmp_path / directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


def test_a_partially_installed_server_is_not_used(program: Program, tmp_path: Path) -> None:
    program("postgres", "echo postgres 17")
    with pytest.raises(servers.MissingError):
        servers.postgresql()
    (tmp_path / "bin/initdb").symlink_to(tmp_path / "removed/initdb")  # of a version that was removed
    with pytest.raises(servers.MissingError):
        servers.postgresql()
    program("initdb", "echo initdb 17", "postgresql/17/bin")
    with pytest.raises(servers.MissingError):
        servers.postgresql()
    program("postgres", "echo 'cannot open shared object file' >&2; exit 127", "postgresql/17/bin")
    with pytest.raises(servers.MissingError):
        servers.postgresql()


def test_the_newest_complete_server_is_used(program: Program, tmp_path: Path) -> None:
    program("postgres", "echo shim")
    for version in ("9.6", "15", "17"):
        for name in ("initdb", "postgres"):
            if (version, name) != ("17", "postgres"):
                program(name, f"echo {name} {version}", f"postgresql/{version}/bin")
    assert servers.postgresql() == tmp_path / "postgresql/15/bin"
    shutil.rmtree(tmp_path / "postgresql")
    program("initdb", "echo initdb 16")
    assert servers.postgresql() == tmp_path / "bin"


def test_a_chromium_of_any_name_is_used_if_it_works(program: Program) -> None:
    with pytest.raises(servers.MissingError):
        servers.chromium()
    program("chromium-browser", "echo 'install the snap' >&2; exit 1")
    with pytest.raises(servers.MissingError):
        servers.chromium()
    chrome = program("google-chrome-stable", "echo Google Chrome 156")
    assert servers.chromium() == str(chrome)


@pytest.mark.parametrize(
    "update", ["", "echo 'E: the lists have expired' >&2; exit 100"], ids=["fresh", "old lists"]
)
def test_installable_tools_are_installed_although_others_are_unavailable(
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update: str,
) -> None:
    def tool(name: str) -> servers.Tool:
        return servers.Tool(name, f"{name}-package", lambda: servers.output(servers.program(name), "--version"))

    program("there", "echo 1.0")
    monkeypatch.setattr(servers, "TOOLS", [tool("there"), tool("withdrawn"), tool("offered")])
    monkeypatch.setattr(servers, "NO_DAEMONS", tmp_path / "policy-rc.d")
    monkeypatch.setattr(servers, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(servers.os, "geteuid", lambda: 0)
    monkeypatch.setattr(htcondor_root, "main", lambda: None)
    monkeypatch.setattr(redis_versions, "install", lambda: None)
    monkeypatch.setattr(servers, "install_published", lambda: None)
    offered = program("offered", "echo 2.0", "new")
    apt_get = program(
        "apt-get",
        f"""echo "$*" >> {tmp_path}/calls
case "$*" in
*update*) {update or ":"} ;;
*withdrawn*) echo "E: Unable to locate package withdrawn-package" >&2; exit 100 ;;
*offered*) test -e {tmp_path}/policy-rc.d && cp {offered} {tmp_path}/bin ;;
esac""",
    )
    monkeypatch.setenv("PATH", str(apt_get.parent), prepend=":")
    servers.install()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "update" in calls[0]
    assert not [call for call in calls if "there-package" in call]
    assert (servers.obstacle("offered"), servers.obstacle("there")) == (None, None)
    printed = capsys.readouterr().err
    assert "withdrawn is not installed: E: Unable to locate package withdrawn-package" in printed
    assert ("the lists have expired" in printed) == bool(update)
    assert not (tmp_path / "policy-rc.d").exists()


def test_a_host_with_all_tools_is_not_changed(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "TOOLS", [servers.Tool("there", "there-package", lambda: "1.0")])
    monkeypatch.setattr(htcondor_root, "ROOT", tmp_path)
    monkeypatch.setattr(redis_versions, "all_there", lambda: True)
    monkeypatch.setattr(htcondor_root, "main", lambda: None)
    monkeypatch.setattr(redis_versions, "install", lambda: None)
    monkeypatch.setattr(servers, "install_published", lambda: None)
    apt_get = program("apt-get", f"echo called > {tmp_path}/called")
    monkeypatch.setenv("PATH", str(apt_get.parent), prepend=":")
    servers.install()
    assert not (tmp_path / "called").exists()
