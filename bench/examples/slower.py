"""gemmconv made 5 % slower by busy-waiting a twentieth of each call: what a bench that is fit for 5 % must find."""

import time
from typing import Any

import gemmconv


def conv3d_transpose(value: Any, filter: Any, *, workers: int, **arguments: Any) -> Any:
    start = time.perf_counter()
    result = gemmconv.conv3d_transpose(value, filter, workers=workers, **arguments)
    end = time.perf_counter()
    while time.perf_counter() < end + (end - start) / 20:
        pass
    return result
