"""Detection of changes of the configuration source."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from pathlib import Path

import pytest
from diracx.tasks.plumbing.config.active import digest
from diracx.tasks.plumbing.config.reader import ConfigReader, ConfigSnapshot, in_thread
from support.config_repository import ConfigRepository

LIMIT = "common: {{Greet: {{concurrency_limit: {}}}}}\n"


def limit_of(reading: ConfigSnapshot) -> int | None:
    assert reading.tasks is not None, reading.problems
    return reading.tasks.get_override("my_tasks:Greet").concurrency_limit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.yaml"
    path.write_text(LIMIT.format(1))
    return path


@pytest.fixture
def reader(path: Path) -> ConfigReader:
    reader = ConfigReader(path)
    assert limit_of(reader.read()) == 1
    return reader


def test_an_unchanged_source_is_not_parsed_again(reader: ConfigReader, path: Path) -> None:
    first = reader.read()
    os.utime(path, (1e9, 1e9))
    assert reader.read() is first


def test_a_file_that_is_edited_in_place_is_read_again(reader: ConfigReader, path: Path) -> None:
    path.write_text(LIMIT.format(22))
    assert limit_of(reader.read()) == 22


def test_a_file_that_is_replaced_is_read_again(reader: ConfigReader, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "new"
    other.write_text(LIMIT.format(3))
    other.replace(path)
    assert limit_of(reader.read()) == 3


def test_a_directory_swapped_behind_a_link_is_detected(tmp_path: Path) -> None:
    """Kubernetes mounts a ConfigMap so: tasks.yaml -> ..data/tasks.yaml, ..data -> ..version."""
    for version in (1, 2):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "tasks.yaml").write_text(LIMIT.format(version))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "tasks.yaml").symlink_to("..data/tasks.yaml")
    reader = ConfigReader(tmp_path / "tasks.yaml")
    assert limit_of(reader.read()) == 1
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").replace(tmp_path / "..data")
    assert limit_of(reader.read()) == 2


def test_a_second_change_within_the_same_timestamp_is_detected(reader: ConfigReader, path: Path) -> None:
    path.write_text(LIMIT.format(2))
    stamp = path.stat()
    assert limit_of(reader.read()) == 2
    path.write_text(LIMIT.format(3))  # the same size, in the same file
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert limit_of(reader.read()) == 3


def test_a_file_that_is_being_written_is_read_when_it_is_complete(reader: ConfigReader, path: Path) -> None:
    begun = threading.Event()

    def write_slowly() -> None:
        with path.open("w") as file:
            file.write("common: {}\n")
            file.flush()
            begun.set()
            threading.Event().wait(0.3)  # shorter than a file has to stay the same
            file.seek(0)
            file.write(LIMIT.format(4))

    writing = threading.Thread(target=write_slowly)
    writing.start()
    begun.wait()
    assert limit_of(reader.read()) == 4
    writing.join()


def test_a_deleted_file_is_an_error_and_is_read_when_it_returns(reader: ConfigReader, path: Path) -> None:
    path.unlink()
    gone = reader.read()
    assert gone.tasks is None
    assert gone.problems == (f"{path}: cannot be read: No such file or directory",)
    assert reader.read() is gone
    path.write_text(LIMIT.format(5))
    assert limit_of(reader.read()) == 5


def test_the_same_text_in_a_new_file_is_no_change(reader: ConfigReader, path: Path, tmp_path: Path) -> None:
    before = reader.read()
    (tmp_path / "same").write_text(LIMIT.format(1))
    (tmp_path / "same").replace(path)
    assert reader.read() is before


def test_a_commit_is_read_by_the_next_poll(tmp_path: Path) -> None:
    repository = ConfigRepository(tmp_path / "config", ["lhcb"])
    reader = ConfigReader(backend_url=repository.url)
    first = reader.read()
    assert first.vos == ("lhcb",)
    assert reader.read() is first
    repository.commit(["lhcb", "cms"], {"common": {"Greet": {"concurrency_limit": 6}}})
    second = reader.read()
    assert second.vos == ("cms", "lhcb")
    assert limit_of(second) == 6
    assert reader.read() is second


def test_a_commit_that_is_no_configuration_is_a_problem_at_once(tmp_path: Path) -> None:
    repository = ConfigRepository(tmp_path / "config", ["lhcb"])
    reader = ConfigReader(backend_url=repository.url)
    reader.read()
    repository.commit_text("Registry: {lhcb: {}}")
    broken = reader.read()
    assert (broken.tasks, broken.vos) == (None, None)
    assert any("Registry.lhcb.IdP" in line for line in broken.problems)
    assert reader.read() is broken
    repository.commit(["cms"])
    assert reader.read().vos == ("cms",)


def test_VOs_are_read_despite_invalid_settings_of_tasks(tmp_path: Path, path: Path) -> None:
    repository = ConfigRepository(tmp_path / "config", ["lhcb"])
    reader = ConfigReader(path, repository.url)
    path.write_text("common: [")
    repository.commit(["cms"])
    reading = reader.read()
    assert reading.tasks is None
    assert reading.vos == ("cms",)


def test_tasks_are_known_despite_an_invalid_diracx_configuration(tmp_path: Path, path: Path) -> None:
    reader = ConfigReader(path, f"git+file://{tmp_path}/nowhere")
    reading = reader.read()
    assert limit_of(reading) == 1
    assert reading.vos is None
    assert len(reading.problems) == 1


def test_a_digest_does_not_depend_on_the_order_of_entries(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("common: {A: {max_retries: 1}, B: {priority: realtime, max_retries: 2}}")
    other.write_text("common:\n  B: {max_retries: 2, priority: realtime}\n  A: {max_retries: 1}\n")
    assert digest(ConfigReader(one).read_tasks()) == digest(ConfigReader(other).read_tasks())
    other.write_text("common: {A: {max_retries: 1}, B: {priority: normal, max_retries: 2}}")
    assert digest(ConfigReader(one).read_tasks()) != digest(ConfigReader(other).read_tasks())


def test_a_digest_is_made_of_binary_arguments(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    digests = []
    for value in ("gIGC", "gIGC", "gIGD"):
        path.write_text(f"common: {{A: {{instances: {{one: {{args: {{key: !!binary {value}}}}}}}}}}}")
        digests.append(digest(ConfigReader(path).read_tasks()))
    assert digests[0] == digests[1] != digests[2]


def test_a_file_that_could_not_be_opened_for_a_moment_is_read_by_a_later_poll(
    reader: ConfigReader, path: Path
) -> None:
    reader.read()
    path.write_text(LIMIT.format(2))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        failed = reader.read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert any("Too many open files" in line for line in failed.problems)
    assert limit_of(reader.read()) == 2


async def test_a_blocked_thread_does_not_block_the_event_loop() -> None:
    release = threading.Event()
    waiting = in_thread(lambda: release.wait(30), "test")
    await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    assert await waiting is True


async def test_an_error_in_a_thread_is_raised_where_it_is_waited_for() -> None:
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0, "test")


def test_a_thread_that_hangs_does_not_keep_the_loop_from_closing() -> None:
    release = threading.Event()

    async def leave() -> None:
        in_thread(release.wait, "test")

    asyncio.run(leave())
    [hanging] = [thread for thread in threading.enumerate() if thread.name == "test"]
    release.set()
    hanging.join(30)  # pytest reports an error that is raised in it
    assert not hanging.is_alive()
