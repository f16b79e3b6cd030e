"""How the bench and its workers talk: JSON objects over a pair of pipes, each after its length in eight bytes."""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any

HEADER = 8


class Closed(Exception):  # noqa: N818 - the other side's end, which is not always an error
    """The other side has closed its end: its process is over."""


class Late(Exception):  # noqa: N818
    """Nothing came in time."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Write one message."""
    text = json.dumps(message).encode()
    data = memoryview(len(text).to_bytes(HEADER, "big") + text)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BrokenPipeError:
            raise Closed from None


def receive(descriptor: int, timeout_s: float | None = None) -> dict[str, Any]:
    """Read one message; None waits for ever."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    size = int.from_bytes(_read(descriptor, HEADER, deadline), "big")
    message: dict[str, Any] = json.loads(_read(descriptor, size, deadline))
    return message


def _read(descriptor: int, size: int, deadline: float | None) -> bytes:
    data = b""
    while len(data) < size:
        if deadline is not None:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Late
        part = os.read(descriptor, size - len(data))
        if not part:
            raise Closed
        data += part
    return data
