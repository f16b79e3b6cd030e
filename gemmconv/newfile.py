"""A .npy file that appears under its name when it is complete, and not at all if it never is.

For the command line's results. Nothing here knows what is written into the file; it imports nothing of the package.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


@contextlib.contextmanager
def new_file(final: Path, force: bool) -> Iterator[Path]:
    """A temporary name in the same folder; renamed to the final one at the end, removed if the end is not reached.

    Raises OSError, before anything is made, if there is no such folder, if the name is taken and not to be replaced
    (`force`), or by something that is no regular file.
    """
    final = final.resolve()  # through a symbolic link: what it points to is replaced, not the link
    check_free(final, force)
    path = final.with_name(f".gemmconv-{secrets.token_hex(8)}.tmp")
    with ended_by_exceptions():
        try:
            yield path
            check_free(final, force)  # it may have come to be meanwhile
            os.replace(path, final)
        finally:
            path.unlink(missing_ok=True)


def check_free(final: Path, force: bool, *, folder: bool = False) -> None:
    """Raise OSError unless a file, or a folder, may be written under this name."""
    if not final.parent.is_dir():
        raise NotADirectoryError(f"there is no folder {final.parent}")
    kind = "folder" if folder else "file"
    if final.exists() and not (final.is_dir() if folder else final.is_file()):
        raise FileExistsError(f"this is not a {'folder' if folder else 'regular file'}; it is left as it is")
    if final.exists() and not force:
        raise FileExistsError(f"this {kind} exists; --force replaces it")


@contextlib.contextmanager
def ended_by_exceptions() -> Iterator[None]:
    """Let a batch system's SIGTERM, or a closed terminal, end the command as Ctrl-C does: through every `finally`."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may set handlers
    # An ignored signal (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler == signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def map_reserved(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Map a new .npy file whose blocks on the disk are all there: a full disk must not end the process by SIGBUS."""
    out: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:  # some file systems cannot reserve; they still can write
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
    return out
