"""Logging and telemetry of commands as configured by `DIRACX_LOG_...` and `DIRACX_OTEL_...`.

Logs have neither passwords nor forged records.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...plumbing._util.passwords import mask
from ...plumbing._util.printable import printable
from ..errors import CliError
from ..options import LogLevel
from .supervisor import own_number

if TYPE_CHECKING:
    from ...plumbing.base_task import BaseTask


TELEMETRY_VARIABLE = "DIRACX_OTEL_ENABLED"


class SafeFormatter(logging.Formatter):
    """Formatter around another one that removes passwords and control sequences, and indents continuation lines.

    With the indentation a logged text that has line feeds cannot forge a record.
    """

    def __init__(self, inner: logging.Formatter, is_json: bool) -> None:
        super().__init__()
        self._inner, self._is_json = inner, is_json

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        if self._is_json:
            return json.dumps(_safe(json.loads(text)), ensure_ascii=False)
        return _safe(text).replace("\n", "\n  ")  # type: ignore[no-any-return]  # a text of a text


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return printable(mask(value))
    if isinstance(value, dict):
        return {_safe(name): _safe(each) for name, each in value.items()}
    return [_safe(each) for each in value] if isinstance(value, list) else value


def set_up_logging(level: LogLevel | None, default: LogLevel = "info") -> int:
    """Log to stderr as `DIRACX_LOG_{FORMAT,LEVEL,LIBRARIES_LEVEL}` configure. Returns the level.

    Args:
        level: level of DiracX and tasks; overrides the environment.
        default: level if neither is set.
    """
    from diracx.core.logs import configure_logging, set_log_context
    from diracx.core.settings import LoggingSettings
    from pydantic import ValidationError

    given = level or (None if os.environ.get("DIRACX_LOG_LEVEL") else default)
    try:
        settings = LoggingSettings() if given is None else LoggingSettings(level=given)
    except ValidationError as error:
        found = error.errors()[0]
        variable = f"DIRACX_LOG_{str(found['loc'][0]).upper()}"
        raise CliError(f"{variable} is {found['input']!r}: {found['msg']}; correct or unset it") from error
    handler = configure_logging(settings)
    assert handler.formatter is not None
    handler.setFormatter(SafeFormatter(handler.formatter, settings.format == "json"))
    logging.captureWarnings(True)
    if (number := own_number()) is not None:
        set_log_context(**{"worker.process": number})
    return logging.getLevelNamesMapping()[settings.level]


def set_task_log_level(registry: Mapping[str, type[BaseTask]]) -> None:
    """Set the level of the packages of tasks to that of DiracX, in place of that of libraries."""
    level = logging.getLogger("diracx").level
    for package in {task_class.__module__.partition(".")[0] for task_class in registry.values()}:
        logging.getLogger(package).setLevel(level)


def set_up_telemetry(component: str) -> None:
    """Export metrics, traces (of SQL statements, too) and logs as configured by `DIRACX_OTEL_…`."""
    if not os.environ.get(TELEMETRY_VARIABLE):
        return
    try:
        from diracx.core.otel import configure_otel

        if (providers := configure_otel(component)) is not None:
            from diracx.db.sql import instrument_sqlalchemy

            instrument_sqlalchemy(providers.tracer_provider, providers.meter_provider)
    except (ImportError, ValueError) as error:
        detail = str(error).splitlines()[0]
        raise CliError(
            f"OpenTelemetry cannot be set up: {detail}; unset {TELEMETRY_VARIABLE} to disable it"
        ) from error
