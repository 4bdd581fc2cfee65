"""Directories of unavailable (ENOTCONN) and of read-only file systems."""

from __future__ import annotations

__all__ = ["dead_mount", "new_dead_mount", "read_only"]

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.machine import not_for_this_machine

_DETACH = 2


@contextmanager
def dead_mount(path: Path) -> Iterator[None]:
    """Cover this directory by a FUSE file system whose server has ended; skips where that is not to be had."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        not_for_this_machine("FUSE file systems are mounted by root, with /dev/fuse")
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"dead", bytes(path), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "cannot mount", str(path))
    finally:
        os.close(server)
    try:
        yield
    finally:
        libc.umount2(bytes(path), _DETACH)


@contextmanager
def new_dead_mount(path: Path) -> Iterator[None]:
    """Make this directory, with a `dead_mount`, and remove it at the end."""
    path.mkdir(parents=True)
    with dead_mount(path):
        yield
    path.rmdir()


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Make this directory read-only for everyone who enters it by its path; skips where that is not to be had."""
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", path, path], check=False).returncode:
        not_for_this_machine("directories are made read-only by root, who may mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
