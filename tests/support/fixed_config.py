"""A DiracX configuration with certain VOs in memory: the application of a test starts without git."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from diracx.core.config import Config, ConfigSource

from support.config_repository import content

_SCHEME = "vos"


def config_url(vos: Iterable[str]) -> str:
    """Value of DIRACX_CONFIG_BACKEND_URL for this process: no other one can read it."""
    return f"{_SCHEME}:///{','.join(vos)}"


class _FixedConfig(ConfigSource):
    scheme = _SCHEME

    def __init__(self, *, backend_url: Any) -> None:
        super().__init__(backend_url=backend_url)
        self._vos = backend_url.path.strip("/").split(",")

    def latest_revision(self) -> tuple[str, datetime]:
        return "the only one", datetime.now(tz=UTC)

    def read_raw(self, hexsha: str, modified: datetime) -> Config:
        return Config.model_validate(content(self._vos))
