"""Configuration of tasks with given VOs."""

from __future__ import annotations

__all__ = ["ReaderWithVos"]

from dataclasses import replace

from diracx.tasks.plumbing.config.reader import ConfigReader, ConfigSnapshot


class ReaderWithVos(ConfigReader):
    """Reads the settings of tasks as usual, and none of a DiracX configuration."""

    vos: tuple[str, ...] = ()

    def read(self) -> ConfigSnapshot:
        return replace(super().read(), vos=self.vos)
