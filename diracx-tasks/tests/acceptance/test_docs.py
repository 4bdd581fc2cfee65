"""The documentation: its examples run, its consoles print that output, its keys exist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from diracx.tasks.plumbing.broker import keys
from support.paths import ROOT
from support.waiting import eventually
from support.warm_commands import WarmCommands

DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
LUA = ROOT / "diracx-tasks/src/diracx/tasks/plumbing/broker/lua"
PAGES = sorted(page for page in DOCS.rglob("*.md"))

_FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_TASK_ID = re.compile(r"\b[0-9a-f]{32}\b")
_MODULES = ("my_tasks.py", "downloads.py", "accounts.py", "tidy.py")
_SECONDS = 60


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in that language, without their indentation. Excerpts are left out."""
    return [
        "\n".join(line.removeprefix(found[1]) for line in found[4].splitlines())
        for found in _FENCE.finditer(page.read_text())
        if found[2] == language and not found[3]
    ]


def excerpts(page: Path) -> list[tuple[str, str]]:
    """Each piece of code that a page quotes, with the path of its file; `# …` stands between two pieces."""
    return [
        (title[1], piece)
        for found in _FENCE.finditer(page.read_text())
        if (title := re.search(r'title="([^"]+)"', found[3]))
        for piece in re.split(r"^ *# …\n", found[4], flags=re.MULTILINE)
    ]


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Each `$ command` of a console with the lines that are printed below it; `…` stands for anything."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    return found


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples as a reader has them: in a directory outside this repository."""
    copied = tmp_path_factory.mktemp("reader") / "examples"
    shutil.copytree(EXAMPLES, copied, ignore=shutil.ignore_patterns("__pycache__"))
    return copied


@pytest.fixture(scope="module")
def reader(examples: Path, warm_commands: WarmCommands) -> Iterator[dict[str, str]]:
    """The environment of a reader's second terminal, while `dev` runs in the first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIRACX_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    modules = [part for module in _MODULES for part in ("--module", module)]
    with (examples / "dev.log").open("w+") as log:
        command = ["diracx-task-run", "dev", *modules]
        dev = warm_commands.start(command, cwd=examples, env=environment, stdout=log, stderr=log)
        try:
            urls: list[str] = []

            def started() -> bool:
                assert dev.poll() is None, (examples / "dev.log").read_text()
                urls.extend(re.findall(r"DIRACX_TASKS_REDIS_URL=(\S+)", (examples / "dev.log").read_text()))
                return bool(urls)

            eventually(started, "dev starts")
            yield {**environment, "DIRACX_TASKS_REDIS_URL": urls[0]}
        finally:
            dev.send_signal(signal.SIGINT)
            dev.wait(timeout=_SECONDS)


def test_the_commands_of_the_first_tutorial_print_what_it_shows(
    examples: Path, reader: dict[str, str], warm_commands: WarmCommands
) -> None:
    shown = [pair for block in blocks(DOCS / "tutorial/first-task.md", "console") for pair in commands(block)]
    ran = 0
    for command, expected in shown:
        if command.startswith(("diracx-task-run dev", "pip ", "export ", "python -m pytest")):
            continue  # the fixture is the first of these; the last is the test below
        ended = warm_commands.run(shlex.split(command), cwd=examples, env=reader, timeout=_SECONDS)
        printed = ended.stdout + ended.stderr
        pattern = r"\n".join(
            ".*".join(re.escape(part) for part in _TASK_ID.sub("ID", line).split("…")) for line in expected
        )
        assert re.fullmatch(pattern, _TASK_ID.sub("ID", printed).strip(), re.DOTALL), f"$ {command}\n{printed}"
        ran += 1
    assert ran >= 5, "the tutorial has lost its commands"


def test_the_examples_pass_their_own_tests(examples: Path, warm_commands: WarmCommands) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DIRACX_", "PYTEST"))}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    (script := examples / "run.py").write_text(f"import sys, pytest\nsys.exit(pytest.main({options!r}))\n")
    ended = warm_commands.run([str(script)], cwd=examples, env=environment, timeout=5 * _SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_in_pages_is_python_and_included_files_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        # The form of an include over three lines is no Python, which keeps formatters from touching it.
        included = re.findall(r"^--8<--\n(.+?)\n--8<--$", block, re.MULTILINE)
        for name in included:
            assert (EXAMPLES / name.partition(":")[0]).is_file(), name
        if not included:
            compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_excerpts_are_the_real_code() -> None:
    quoted = [(page, *excerpt) for page in PAGES for excerpt in excerpts(page)]
    assert quoted
    for page, path, piece in quoted:
        # Whatever the indentation and the line breaks.
        assert "".join(piece.split()) in "".join((ROOT / path).read_text().split()), (
            f"{page.relative_to(DOCS)} quotes {path}, which no longer says:\n{piece}"
        )


def test_every_script_is_explained() -> None:
    explained = (DOCS / "explanation/scripts.md").read_text()
    transitions = (DOCS / "explanation/transitions.md").read_text()
    for script in sorted(LUA.glob("*.lua")):
        assert f"`{script.name}`" in explained, script.name
        if not script.name.startswith("_"):
            assert f"`{script.name}`" in transitions, script.name


def test_every_redis_key_is_explained() -> None:
    explained = (DOCS / "explanation/redis-keys.md").read_text()
    for name, value in keys.script_constants().items():
        assert value in explained, f"keys.{name}"


def test_the_reference_of_settings_matches_the_models() -> None:
    spec = importlib.util.spec_from_file_location("configuration_page", DOCS / "hooks/configuration.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run `python docs/hooks/configuration.py`"
    for _, model in script.SECTIONS:
        for name, field in model.model_fields.items():
            model.model_validate({name: field.examples[0]})


def test_every_setting_of_a_worker_is_explained() -> None:
    from diracx.tasks.plumbing.worker.settings import WorkerSettings

    workers = (DOCS / "how-to/run-workers.md").read_text()
    for field in WorkerSettings.model_fields:
        assert f"`{field}`" in workers, f"WorkerSettings.{field}"


def test_no_page_sends_its_reader_to_another_host() -> None:
    for page in PAGES:
        for found in re.findall(r"\]\((https?://[^)]+)\)", page.read_text()):
            pytest.fail(f"{page.relative_to(DOCS)}: {found}")


def test_every_picture_is_shown_described_and_small() -> None:
    pages = [*PAGES, ROOT / "README.md"]
    shown = {
        (page.parent / picture).resolve(): words
        for page in pages
        for words, picture in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text())
    }
    kept = {file.resolve() for file in (DOCS / "images").iterdir()}
    assert set(shown) == kept
    assert all(len(words) > 20 for words in shown.values())
    assert all(file.stat().st_size <= 100_000 for file in kept)


#: Set by a process for its children, or a setting of DiracX.
_INTERNAL_VARIABLES = {"DIRACX_TASKS_PROCESS_NUMBER", "DIRACX_TASKS_SUPERVISOR_SOCKET", "DIRACX_SERVICE_DOTENV"}


def test_every_environment_variable_is_documented() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    sources = [file for each in ("diracx-tasks/src", "gubbins/src") for file in (ROOT / each).rglob("*.py")]
    found = {
        name
        for source in sources
        for name in re.findall(r"\b(?:DIRACX|GUBBINS)_[A-Z_]*[A-Z]\b(?!_)", source.read_text())
    }
    assert len(found) > 10
    assert {name for name in found - _INTERNAL_VARIABLES if name not in pages} == set()


def test_log_messages_that_are_explained_exist() -> None:
    sources = (ROOT / "diracx-tasks/src").rglob("*.py")
    text = re.sub(r'"\s+f?"', "", "".join(source.read_text() for source in sources))
    page = (DOCS / "how-to/run-workers.md").read_text()
    table = page.partition("| message | meaning and remedy |\n|---|---|\n")[2].partition("\n\n")[0]
    messages = [each for row in table.splitlines() for each in re.findall(r"`([^`]+)`", row.split("|")[1])]
    parts = [part.strip(" ;:") for message in messages for part in re.split(r"…|\d+(?: s)?", message)]
    assert len(messages) > 10
    assert [part for part in parts if len(part) > 3 and part not in text] == []
