"""Read files that a pilot may have replaced, without following links, blocking or reading for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

# The last: a socket.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO}


def read_start(directory: Path, name: str, limit_bytes: int) -> bytes:
    """The first bytes of a regular file in a directory, neither of them a symbolic link.

    Raises:
        OSError: there is no such file.
    """
    descriptor = _open(directory, name)
    try:
        return _read(descriptor, limit_bytes)
    finally:
        os.close(descriptor)


def read_end(directory: Path, name: str, limit_bytes: int) -> bytes:
    """The last bytes; else as `read_start`."""
    descriptor = _open(directory, name)
    try:
        os.lseek(descriptor, max(0, os.fstat(descriptor).st_size - limit_bytes), os.SEEK_SET)
        return _read(descriptor, limit_bytes)
    finally:
        os.close(descriptor)


def modified_at(path: Path) -> float | None:
    """Modification time of a file or directory (s since 1970); None: there is none. Follows no link.

    Raises:
        OSError: it cannot be known.
    """
    try:
        return path.lstat().st_mtime
    except OSError as error:
        raise_unless_absent(error)
        return None


def raise_unless_absent(error: OSError) -> None:
    """Raise the error, unless it says that there is no such file, or that something else is in its place.

    Of a file that cannot be read now (stale handle, lost connection, no permission) nothing is known.
    """
    if error.errno not in _ABSENT:
        raise error


def _open(directory: Path, name: str) -> int:
    # Opened one after the other: the directory may be replaced in between.
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # A FIFO without a writer is opened at once, and refused below.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return descriptor


def _read(descriptor: int, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    while limit_bytes > 0 and (part := os.read(descriptor, limit_bytes)):
        parts.append(part)
        limit_bytes -= len(part)
    return b"".join(parts)
