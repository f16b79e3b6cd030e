"""A result that is written box by box under a name of its own, with a record of what is done, so that it can go on.

Beside OUT there are OUT.part, which becomes OUT at the end, and OUT.part.log: a line that says what is computed, and
one for each box that is written and on the disk. Nothing here knows how a box is computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemmconv.newfile import check_free, ended_by_exceptions

try:
    import fcntl
except ImportError:  # not POSIX: two runs at once are not noticed
    fcntl = None  # type: ignore[assignment]


class Resumed(NamedTuple):
    """A file in the making: its name, how it is cut, which boxes are done, and what to call when another is."""

    path: Path
    chunks: list[list[int]]
    done: frozenset[int]
    finished: Callable[[int], None]


@contextlib.contextmanager
def resumable(
    final: Path,
    what: dict[str, Any],
    chunks: list[list[int]],
    make: Callable[[Path], object],
    *,
    force: bool = False,
    folder: bool = False,
) -> Iterator[Resumed]:
    """A file or folder that gets its final name at the end; if the end is not reached it stays for the next time.

    `what` says, as JSON, what is computed from what: what was begun with another is refused, or with `force` begun
    anew. `make` makes the empty result. How it was cut when it was begun is how it goes on.

    Raises OSError as `new_file` does, and ValueError if it belongs to another result.
    """
    final = final.resolve()
    check_free(final, force, folder=folder)
    path = final.with_name(f"{final.name}.part")
    record = final.with_name(f"{final.name}.part.log")
    with ended_by_exceptions(), open(record, "a+", encoding="utf-8") as log:
        if fcntl is not None:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FileExistsError(f"another process is writing {path.name}") from None
        log.seek(0)
        text = log.read()
        if text and not text.endswith("\n"):  # the machine stopped in the middle of a line
            log.write("\n")
        lines = text.splitlines()
        begun = _header(lines)
        if begun is not None and path.exists() and begun["what"] != what and not force:
            differs = [key for key in what if begun["what"].get(key) != what[key]] or ["version"]
            raise ValueError(
                f"{path.name} is an interrupted result with another {', '.join(differs)}; --force begins anew"
            )
        if begun is None or not path.exists() or begun["what"] != what:
            remove(path)
            log.truncate(0)
            make(path)
            begun, lines = {"what": what, "chunks": chunks}, []
            _write(log, json.dumps(begun))
        found = (re.fullmatch(r"box (\d+) done", line) for line in lines[1:])
        done = frozenset(int(match[1]) for match in found if match)
        yield Resumed(path, begun["chunks"], done, lambda number: _write(log, f"box {number} done"))
        check_free(final, force, folder=folder)
        if path.is_dir() and final.exists():
            remove(final)  # a folder cannot be renamed to one that is there
        os.replace(path, final)
        record.unlink()


def _header(lines: list[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(lines[0])
        return found if {"what", "chunks"} <= set(found) else None
    except (IndexError, ValueError, TypeError):
        return None


def _write(log: Any, line: str) -> None:
    """Add a line that is on the disk when this returns."""
    log.write(f"{line}\n")
    log.flush()
    os.fsync(log.fileno())


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
