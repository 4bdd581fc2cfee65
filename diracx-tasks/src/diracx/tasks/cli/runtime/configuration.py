"""Reads the settings of tasks and the DiracX configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...plumbing.config import TasksConfig, checked_tasks_config
from ...plumbing.config.reader import ConfigReader, explain
from ...plumbing.exceptions import TaskConfigError
from ...plumbing.registry import TaskRegistry
from ..errors import CliError

if TYPE_CHECKING:
    from diracx.core.config import Config

logger = logging.getLogger(__package__)

CONFIG_VARIABLE = "DIRACX_CONFIG_BACKEND_URL"


@dataclass(frozen=True)
class Configuration:
    """The settings of tasks and the VOs, as configured."""

    tasks: TasksConfig
    vos: tuple[str, ...] | None
    """None without a DiracX configuration."""
    reader: ConfigReader
    """Reads and checks the configuration again."""


def read_configuration(registry: TaskRegistry) -> Configuration:
    """Read the settings of tasks and the VOs. Logs a warning for each unknown name."""
    reader = ConfigReader.from_environment(registry)
    with _explained_configuration():
        config = reader.read_config()
        vos = None if config is None else tuple(sorted(config.registry))
        tasks, warnings = checked_tasks_config(registry, vos, config=config)
    for line in warnings:
        logger.warning("configuration of tasks: %s", line)
    return Configuration(tasks, vos, reader)


def tasks_config() -> TasksConfig:
    """Read the settings of tasks alone; errors as of `read_configuration`."""
    with _explained_configuration():
        return ConfigReader.from_environment().read_tasks()


def diracx_config() -> Config | None:
    """Read the DiracX configuration, None without one; errors as of `read_configuration`."""
    with _explained_configuration():
        return ConfigReader.from_environment().read_config()


@contextmanager
def _explained_configuration() -> Iterator[None]:
    try:
        yield
    except TaskConfigError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise CliError(f"the configuration of tasks is wrong: {lines[0]}") from error
        raise CliError(
            f"the configuration of tasks is wrong in {len(lines)} places", detail=f"{error}\n"
        ) from error
    except Exception as error:
        raise CliError(
            f"cannot read the DiracX configuration at {os.environ.get(CONFIG_VARIABLE)}: "
            f"{'; '.join(explain(error))}; check {CONFIG_VARIABLE}"
        ) from error
