"""Reads the configuration of tasks and the VOs repeatedly, at low cost while nothing changes.

All functions block (files, git, YAML): coroutines call them through `in_thread`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from ..base_task import BaseTask
from ..exceptions import TaskConfigError
from . import CONFIG_PATH_VARIABLE, TasksConfig, checked_tasks_config, load_tasks_config

if TYPE_CHECKING:
    from diracx.core.config import Config, ConfigSource

    Registry = Mapping[str, type[BaseTask]]

BACKEND_URL_VARIABLE = "DIRACX_CONFIG_BACKEND_URL"

#: A changed file is parsed when it has not changed for this time, as it may still be written.
_SETTLED_SECONDS = 0.5
_SETTLING_ROUNDS = 4

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ConfigSnapshot:
    """Configuration at one moment."""

    tasks: TasksConfig | None
    """None: it is wrong, or cannot be read; see the problems."""
    vos: tuple[str, ...] | None
    """None without a DiracX configuration, or if it cannot be read."""
    problems: tuple[str, ...] = ()


class ConfigReader:
    """Reads the configuration of tasks and the VOs. Not thread-safe.

    Args:
        path: the YAML file; used in place of the section of the DiracX configuration.
        backend_url: URL of the DiracX configuration.
        registry: check the configuration against these tasks, too.
    """

    def __init__(
        self, path: Path | None = None, backend_url: str | None = None, registry: Registry | None = None
    ) -> None:
        self._load: Callable[..., TasksConfig] = load_tasks_config
        if registry is not None:
            self._load = lambda **source: checked_tasks_config(registry, None, **source)[0]
        self._file = None if path is None else _File(path, self._load)
        self._diracx = _Diracx(backend_url) if backend_url else None
        self._of_config: tuple[Config, TasksConfig | TaskConfigError] | None = None
        self._last: ConfigSnapshot | None = None

    @classmethod
    def from_environment(cls, registry: Registry | None = None) -> ConfigReader:
        """Make a reader of `DIRACX_TASKS_CONFIG` and `DIRACX_CONFIG_BACKEND_URL`."""
        path = os.environ.get(CONFIG_PATH_VARIABLE)
        return cls(Path(path) if path else None, os.environ.get(BACKEND_URL_VARIABLE), registry)

    @property
    def source(self) -> str:
        """Source of the settings of tasks: a path, `Systems.Tasks`, or `defaults`."""
        if self._file is not None:
            return str(self._file.path)
        return "defaults" if self._diracx is None else "Systems.Tasks"

    @property
    def can_change(self) -> bool:
        """True if there is a source that may change."""
        return self._file is not None or self._diracx is not None

    def read_config(self) -> Config | None:
        """Read the DiracX configuration; None if not configured.

        Raises:
            Exception: raised by its source if it cannot be read.
        """
        return None if self._diracx is None else self._diracx.read()

    def read_tasks(self, config: Config | None = None) -> TasksConfig:
        """Read the settings of tasks.

        Args:
            config: the DiracX configuration; read if None and needed.

        Raises:
            TaskConfigError: has one line for each problem of the file or section.
            Exception: as `read_config`.
        """
        if self._file is not None:
            return self._file.read()
        if config is None and (config := self.read_config()) is None:
            return TasksConfig()
        if self._of_config is None or self._of_config[0] is not config:
            self._of_config = config, _outcome(lambda: self._load(config=config))
        return _value_of(self._of_config[1])

    def read(self) -> ConfigSnapshot:
        """Read the configuration; return the previous object if it has not changed."""
        config, vos, problems = None, None, []
        try:
            config = self.read_config()
        except Exception as error:
            problems += problems_of(error)
        else:
            vos = None if config is None else tuple(sorted(config.registry))
        tasks = None
        if self._file is not None or not problems:
            try:
                tasks = self.read_tasks(config)
            except TaskConfigError as error:
                problems += problems_of(error)
        reading = ConfigSnapshot(tasks, vos, tuple(problems))
        if self._last is None or reading != self._last:
            self._last = reading
        return self._last


def _outcome(read: Callable[[], TasksConfig]) -> TasksConfig | TaskConfigError:
    try:
        return read()
    except TaskConfigError as error:
        return error


def _value_of(outcome: TasksConfig | TaskConfigError) -> TasksConfig:
    if isinstance(outcome, TaskConfigError):
        raise outcome.with_traceback(None)  # tracebacks would accumulate when it is raised repeatedly
    return outcome


class _File:
    """A YAML file, parsed again when its content has changed."""

    def __init__(self, path: Path, load: Callable[..., TasksConfig]) -> None:
        self.path = path
        self._load = load
        self._content: bytes | None = None
        self._outcome: TasksConfig | TaskConfigError | None = None

    def read(self) -> TasksConfig:
        """Return its settings.

        Raises:
            TaskConfigError: it is wrong, or does not exist.
        """
        content = self._settled_content()
        if self._outcome is None or content is None or content != self._content:
            self._outcome = _outcome(lambda: self._load(path=self.path))
            self._content = content
        return _value_of(self._outcome)

    def _settled_content(self) -> bytes | None:
        """Return the content once it has settled, or after some seconds; None if it cannot be read."""
        content = _content_of(self.path)
        for _ in range(_SETTLING_ROUNDS if self._outcome is not None else 0):
            if content == self._content:
                break
            time.sleep(_SETTLED_SECONDS)
            before, content = content, _content_of(self.path)
            if content == before:
                break
        return content


def _content_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


class _Diracx:
    """The DiracX configuration, read again when there is a new revision.

    Calls the two steps of `ConfigSource.read()`, whose cache is seconds late and hides an invalid commit for an
    hour.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._source: ConfigSource | None = None
        self._revision: tuple[str, datetime] | None = None
        self._outcome: Config | Exception | None = None

    def read(self) -> Config:
        from diracx.core.config import ConfigSource
        from diracx.core.exceptions import BadConfigurationVersionError

        if self._source is None:
            self._source = ConfigSource.create_from_url(backend_url=self._url)
        revision = self._source.latest_revision()
        if self._outcome is None or self._revision is None or revision[0] != self._revision[0]:
            try:
                self._outcome = self._source.read_raw(*revision)
            except (BadConfigurationVersionError, OSError):
                raise  # git failed, or was not started: the same revision may be readable at the next poll
            except Exception as error:
                self._outcome = error
            self._revision = revision
        if isinstance(self._outcome, Exception):
            raise self._outcome.with_traceback(None)
        return self._outcome


def problems_of(error: BaseException) -> list[str]:
    """Return the lines of an error of `ConfigReader`."""
    if isinstance(error, TaskConfigError):
        return str(error).splitlines()
    return [f"the DiracX configuration cannot be read: {line}" for line in explain(error)]


def explain(error: BaseException) -> list[str]:
    """Explain why the DiracX configuration cannot be read: a line per mistake, or the error of git."""
    if isinstance(error, ValidationError):
        return [f"{'.'.join(map(str, item['loc'])) or 'the top level'}: {item['msg']}" for item in error.errors()]
    if isinstance(error, KeyError):
        return [f"unknown kind of source {error}"]
    # The output of git includes its command line; the last line is the error.
    cause = error if hasattr(error, "stderr") else error.__cause__
    printed: Any = getattr(cause, "stderr", b"")
    text = printed.decode(errors="replace") if isinstance(printed, bytes) and printed.strip() else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not (isinstance(printed, bytes) and printed.strip()):
        return [" ".join(lines) or type(error).__name__]
    return lines[-1:]


def in_thread(call: Callable[[], _Value], name: str) -> asyncio.Future[_Value]:
    """Call a blocking function in a daemon thread.

    Git may hang on an unavailable file system; a thread of the pool of the event loop would then block the exit.
    """
    outcome: Future[_Value] = Future()
    outcome.set_running_or_notify_cancel()

    def work() -> None:
        try:
            value = call()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)

    threading.Thread(target=work, name=name, daemon=True).start()
    return asyncio.wrap_future(outcome)
