"""Calls in which NumPy ignores floating point errors, whatever the caller has set, and which leave that as it is.

`np.errstate` sets it for the calling thread and sets it back, and an interrupt as one of both ends would leave it
changed. NumPy >= 2 keeps it in a context variable, so here it is set in a context of the call's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_context = Context()
_context.run(np.seterr, all="ignore")


def quiet(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function called so; it sees none of the caller's context variables."""

    @wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        return _context.copy().run(function, *arguments, **named)

    return call
