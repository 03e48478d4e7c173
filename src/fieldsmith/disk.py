"""What a disk is asked for beside reading and writing: that a write has arrived, checksums, and errors with a place.

A rename is atomic for readers, but after a power failure what it renamed may be empty: file and folder are synced, too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: pathlib.Path) -> None:
    """Until a file, or the names in a folder, are on the disk and not only in the system's memory."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if folder:  # some systems open no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network disks do not sync folders; they are asked for it all the same where they can
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def checksum(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Errors of the system inside are about this path, where they name none: a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def free(path: pathlib.Path) -> int | None:
    """Bytes that are free where a path lies or will lie; None where that cannot be asked."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def size(bytes_: float) -> str:
    """Bytes in the unit that suits them, of powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if abs(bytes_) < 1000:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1000
    return f"{bytes_:,.1f} GB"
