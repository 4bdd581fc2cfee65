"""Safe reads of files that a pilot may have replaced by links, FIFOs or endless files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

# ENXIO: a socket.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO}


def read_start(directory: Path, name: str, limit_bytes: int) -> bytes:
    """Read the first bytes of a regular file; neither the file nor its directory may be a symbolic link.

    Raises:
        OSError: there is no such file.
    """
    descriptor = _open(directory, name)
    try:
        return _read(descriptor, limit_bytes)
    finally:
        os.close(descriptor)


def read_end(directory: Path, name: str, limit_bytes: int) -> bytes:
    """Read the last bytes of a file; see `read_start`."""
    descriptor = _open(directory, name)
    try:
        os.lseek(descriptor, max(0, os.fstat(descriptor).st_size - limit_bytes), os.SEEK_SET)
        return _read(descriptor, limit_bytes)
    finally:
        os.close(descriptor)


def modified_at(path: Path) -> float | None:
    """Get the modification time of a file or directory (s since 1970); None: it does not exist. Follows no links.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return path.lstat().st_mtime
    except OSError as error:
        raise_unless_absent(error)
        return None


def raise_unless_absent(error: OSError) -> None:
    """Raise the error unless it means that there is no such regular file.

    Other errors (stale handle, lost connection, no permission) leave the state of the file unknown.
    """
    if error.errno not in _ABSENT:
        raise error


def _open(directory: Path, name: str) -> int:
    # Relative to the open directory, which may be replaced meanwhile.
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Does not block on a FIFO, which is refused below.
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
