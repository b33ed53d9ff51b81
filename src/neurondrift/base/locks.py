"""One command at a time in a folder: a lock that ends with the process, however it ends.

A file that the kernel locks (flock). What a killed command leaves of it blocks nobody: the kernel's lock counts, not
that the file is there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from neurondrift.base.errors import ResourceError
from neurondrift.base.files import make_folder, remove_partial, storage_error

logger = logging.getLogger(__name__)

NAME = ".neurondrift.lock"
IN_USE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def only_one(folder: Path, writes: Sequence[str] = ()) -> Iterator[None]:
    """Within the block no other command works in the folder, which is made where it is not there (and goes again where
    nothing came into it). What killed commands have left of the files that the command `writes` is deleted: names in
    the folder, of folders with all below them; `*` stands for anything.

    Raises `ResourceError` where one does already. File systems that cannot lock are used without.
    """
    stood = folder.exists()
    make_folder(folder)
    descriptor = _locked(folder / NAME)
    try:
        for name in writes:
            remove_partial(folder / name)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()  # while it is locked: who has opened it sees that it is gone
            os.close(descriptor)
        if not stood:
            with contextlib.suppress(OSError):
                folder.rmdir()  # an empty one only


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock; None where the file system knows no locks."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if (refused := storage_error(error, path)) is not None:
                raise refused from error
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 100, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if error.errno in IN_USE:
                raise ResourceError(
                    f"Another command is at work in the folder {path.parent}",
                    received=holder or None,
                    fix="wait until it has ended, or choose another --output-dir",
                ) from error
            logger.info("%s cannot be locked (%s): nothing keeps two commands apart", path, error)
            return None
        if _is_at(descriptor, path):
            with contextlib.suppress(OSError):  # a full disk: the lock holds, only its name is not told
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            return descriptor
        os.close(descriptor)  # the one before us has just removed it


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
