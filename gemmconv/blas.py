"""GEMM on addresses: SciPy's BLAS through its function pointers, guarded, or `np.matmul` where that cannot be.

The one file with ctypes. SciPy publishes its BLAS as capsules in `scipy.linalg.cython_blas`; called through ctypes
they release the GIL, take leading dimensions and beta, and need no array object for each operand. This module knows
nothing of convolutions or threads, and chooses nothing but which of the two paths is taken, once for each dtype.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg.cython_blas as cython_blas
import threadpoolctl

_PREFIX = {"f4": "s", "f8": "d", "c8": "c", "c16": "z"}
# void f(transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc): the integers' type decides the BLAS' width.
_SIGNATURE = re.compile(
    r"void \(char \*, char \*, (?P<i>\w+) \*, (?P=i) \*, (?P=i) \*, (?P<t>\w+) \*, (?P=t) \*, (?P=i) \*, "
    r"(?P=t) \*, (?P=i) \*, (?P=t) \*, (?P=t) \*, (?P=i) \*\)"
)
# void f(trans, m, n, alpha, a, lda, x, incx, beta, y, incy)
_GEMV_SIGNATURE = re.compile(
    r"void \(char \*, (?P<i>\w+) \*, (?P=i) \*, (?P<t>\w+) \*, (?P=t) \*, (?P=i) \*, "
    r"(?P=t) \*, (?P=i) \*, (?P=t) \*, (?P=t) \*, (?P=i) \*\)"
)
_BITS = {"int": 32, "int32_t": 32, "int64_t": 64, "npy_int64": 64, "long long": 64}
# interface/gemm.c of OpenBLAS: SMP_THRESHOLD_MIN (65536) times GEMM_MULTITHREAD_THRESHOLD (4). Complex products that
# were seen to use one thread: up to 32768 with 0.3.26, up to 65535 with 0.3.30.
_OPENBLAS_SERIAL_PRODUCTS = {"f": 262144, "c": 32768}

# kernel/x86_64/{s,d}gemm_small_kernel_permit_skylakex.c of OpenBLAS 0.3.17 and later: plain products up to 100^3.
_SMALL_PRODUCTS = 1_000_000
# A matrix that one vector is multiplied with: beyond this many values it comes from memory, and with rows no longer
# than this NumPy's einsum reads it up to twice as fast as gemv.
_FAR, _SHORT_ROW = 1 << 20, 1024
_SMALL_KERNELS = {"SkylakeX", "Cooperlake", "SapphireRapids"}

_paths: dict[str, _Path] = {}

# Of one size, since ctypes keeps the type of each size for ever.
_Memory = ctypes.c_char * (sys.maxsize // 2)


class _Path:
    """How one dtype's products are formed: `gemm` is None where it is np.matmul, and `gemv` where it is not used."""

    def __init__(
        self,
        gemm: Callable[..., None] | None,
        bits: int,
        reason: str,
        gemv: Callable[..., None] | None = None,
    ) -> None:
        self.gemm = gemm
        self.gemv = gemv
        self.largest: int = 2 ** (bits - 1) - 1
        self.bits = bits
        self.reason = reason


class Integers:
    """Sizes and leading dimensions of a product, and where they lie."""

    def __init__(self) -> None:
        # 64-bit slots, so that a BLAS of either integer width reads the same number (on little-endian machines).
        self.values = memoryview(bytearray(8 * 6)).cast("q")
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.values))
        self.at = tuple(range(start, start + 48, 8))


class Gemm:
    """C = A B (+ C) on addresses, row-major, for one dtype and one thread at a time.

    Integers go to BLAS by their addresses, in memory that is used again.
    """

    def __init__(self, dtype: np.dtype[Any], path: _Path | None = None) -> None:
        path = path or _path(dtype)
        self.dtype = dtype
        self.itemsize = dtype.itemsize
        self.largest = path.largest
        self._gemm, self._gemv = path.gemm, path.gemv
        # BLAS threads gemv much earlier than GEMM: only products above GEMM's own limit may go there, whose callers
        # hold BLAS to one thread.
        self._serial = serial_products(dtype.kind)
        self._integers = Integers()
        self._scalars = np.array([0, 1], dtype)
        self._beta = self._scalars.ctypes.data
        self._one = self._beta + self.itemsize

    def __call__(
        self,
        m: int,
        n: int,
        k: int,
        a: int,
        lda: int,
        a_transposed: bool,
        b: int,
        ldb: int,
        b_transposed: bool,
        c: int,
        ldc: int,
        accumulate: bool = False,
    ) -> None:
        """Form C[m, n] from A[m, k] and B[k, n]; a transposed operand lies as [k, m] or [n, k].

        Leading dimensions are the distances between rows as they lie, in elements. No conjugation.
        """
        function, arguments = self.call(
            self._integers, m, n, k, a, lda, a_transposed, b, ldb, b_transposed, c, ldc, accumulate
        )
        function(*arguments)

    def call(
        self, integers: Integers, m: int, n: int, k: int, a: Any, lda: int, a_transposed: bool,
        b: Any, ldb: int, b_transposed: bool, c: Any, ldc: int, accumulate: bool,
    ) -> tuple[Callable[..., None], list[Any]]:  # fmt: skip
        """Return what forms a product, and its arguments, among which are `a`, `b` and `c` as they are given.

        They are good for as long as `integers` hold what this writes to them.
        """
        if max(m, n, k, lda, ldb, ldc) > self.largest:
            raise OverflowError(
                f"GEMM of m={m}, n={n}, k={k}, leading dimensions {lda}, {ldb}, {ldc}: "
                f"BLAS' integers end at {self.largest}"
            )
        if self._gemm is None:
            return self._matmul, [m, n, k, a, lda, a_transposed, b, ldb, b_transposed, c, ldc, accumulate]
        if m == 1 and reads_matrix(self.dtype, n, k, b_transposed):
            return self._einsum, [n, k, a, lda if a_transposed else 1, b, ldb, b_transposed, c, accumulate]
        beta, of_b, values = self._one if accumulate else self._beta, b"T" if b_transposed else b"N", integers.values
        if m == 1 and self._gemv is not None and n * k > self._serial:
            # GEMM would pack all of B to use it once. Column-major, B lies as [k, n] if transposed, else as [n, k].
            values[0], values[1] = (k, n) if b_transposed else (n, k)
            values[2], values[3], values[4] = ldb, lda if a_transposed else 1, 1
            rows, columns, step_b, step_a, step_c, _ = integers.at
            return self._gemv, [of_b, rows, columns, self._one, b, step_b, a, step_a, beta, c, step_c]
        # BLAS is column-major: the same memory reads as C' = B' A'.
        values[0], values[1], values[2], values[3], values[4], values[5] = n, m, k, ldb, lda, ldc
        rows, columns, depth, step_b, step_a, step_c = integers.at
        of_a = b"T" if a_transposed else b"N"
        return self._gemm, [of_b, of_a, rows, columns, depth, self._one, b, step_b, a, step_a, beta, c, step_c]

    def _einsum(
        self, n: int, k: int, a: int, step: int, b: int, ldb: int, b_transposed: bool, c: int, accumulate: bool
    ) -> None:
        row, out = self._matrix(a, k, 1, step)[:, 0], self._matrix(c, 1, n, n)[0]
        found = out if not accumulate else np.empty_like(out)
        if b_transposed:
            np.einsum("k,nk->n", row, self._matrix(b, n, k, ldb), out=found)
        else:
            np.einsum("k,kn->n", row, self._matrix(b, k, n, ldb), out=found)
        if accumulate:
            out += found

    def _matmul(
        self, m: int, n: int, k: int, a: int, lda: int, a_transposed: bool,
        b: int, ldb: int, b_transposed: bool, c: int, ldc: int, accumulate: bool,
    ) -> None:  # fmt: skip
        left = self._matrix(a, k, m, lda).T if a_transposed else self._matrix(a, m, k, lda)
        right = self._matrix(b, n, k, ldb).T if b_transposed else self._matrix(b, k, n, ldb)
        out = self._matrix(c, m, n, ldc)
        if accumulate:
            out += left @ right
        else:
            np.matmul(left, right, out=out)

    def _matrix(self, address: int, rows: int, columns: int, ld: int) -> np.ndarray[Any, Any]:
        size = ((rows - 1) * ld + columns) * self.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(address))
        return np.ndarray((rows, columns), self.dtype, memory, strides=(ld * self.itemsize, self.itemsize))


def memory_at(address: int) -> Any:
    """Return all memory from an address on as a buffer: arrays of it must end where what is there ends."""
    return _Memory.from_address(address)


def largest_integer(dtype: np.dtype[Any]) -> int:
    """Return the largest size or leading dimension that BLAS takes for a dtype."""
    return _path(dtype).largest


@cache
def serial_products(kind: str = "f") -> int:
    """Return the m*n*k up to which BLAS is known to use one thread by itself; 0 where nothing is known.

    `kind` is that of the dtype: 'f' or 'c'.
    """
    apis = {pool["internal_api"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}
    return _OPENBLAS_SERIAL_PRODUCTS[kind] if apis == {"openblas"} else 0


@cache
def small_products() -> int:
    """Return the m*n*k up to which NumPy's BLAS is known to multiply without packing its operands; 0 if it is not."""
    found = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    known = all(pool["internal_api"] == "openblas" and pool["architecture"] in _SMALL_KERNELS for pool in found)
    return _SMALL_PRODUCTS if found and known else 0


def reads_matrix(dtype: np.dtype[Any], n: int, k: int, transposed: bool) -> bool:
    """Whether the product of one row and a matrix [k, n], or [n, k] if transposed, is formed without BLAS."""
    far = n * k > _FAR and (k if transposed else n) <= _SHORT_ROW
    return far and dtype.kind == "f" and _path(dtype).gemm is not None


def describe() -> dict[str, Any]:
    """Return which path each dtype takes and why, ready for JSON."""
    paths = {np.dtype(code).name: _path(np.dtype(code)) for code in _PREFIX}
    return {
        name: {
            "path": "numpy.matmul" if path.gemm is None else "scipy.linalg.cython_blas",
            "integer_bits": path.bits,
            "reason": path.reason,
        }
        for name, path in paths.items()
    }


def _path(dtype: np.dtype[Any]) -> _Path:
    """Return a dtype's path, choosing and testing it on first use; two threads may do so at once, to the same end."""
    code = f"{dtype.kind}{dtype.itemsize}"
    if code not in _paths:
        _paths[code] = _choose(dtype, _PREFIX[code] + "gemm")
    return _paths[code]


def _choose(dtype: np.dtype[Any], name: str) -> _Path:
    capsule = getattr(cython_blas, "__pyx_capi__", {}).get(name)
    if capsule is None:
        return _Path(None, 64, f"this SciPy publishes no {name} in scipy.linalg.cython_blas")
    pointer, signature = _opened(capsule)
    match = _SIGNATURE.fullmatch(signature)
    bits = _BITS.get(match["i"]) if match else None
    if bits is None:
        return _Path(None, 64, f"{name} has a signature this version does not know: {signature}")
    gemm = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(pointer)
    path = _Path(gemm, bits, f"{name}'s signature and a test product are as expected")
    if wrong := self_test(Gemm(dtype, path)):
        return _Path(None, 64, f"{name} failed its test product: {wrong}")
    vector = cython_blas.__pyx_capi__.get(name.replace("gemm", "gemv"))
    if vector is not None:
        pointer, signature = _opened(vector)
        match = _GEMV_SIGNATURE.fullmatch(signature)
        if match is not None and _BITS.get(match["i"]) == bits:
            path.gemv = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 11)(pointer)
            trial = Gemm(dtype, path)
            trial._serial = 0
            if self_test(trial, rows=1):
                path.gemv = None
    return path


def _opened(capsule: object) -> tuple[int, str]:
    """Return a capsule's pointer and its name, which is the function's signature."""
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = get_name(capsule)
    return get_pointer(capsule, name), name.decode()


def self_test(gemm: Gemm, rows: int = 3) -> str:
    """Form small products between guard cells; return what was wrong, or an empty string."""
    m, n, k, pad, guard = rows, 5, 4, 2, 77
    for a_transposed in (False, True):
        for b_transposed in (False, True):
            a = np.arange(m * k).reshape(m, k) % 7 - 3
            b = np.arange(k * n).reshape(k, n) % 5 - 2
            stored = [x.T if t else x for x, t in ((a, a_transposed), (b, b_transposed))]
            left, right = (np.ascontiguousarray(np.pad(x, ((0, 0), (0, pad))), gemm.dtype) for x in stored)
            c = np.full((m + 2, n + pad), guard, gemm.dtype)
            expected = c.copy()
            for accumulate in (False, True):
                expected[1:-1, :n] = a @ b * (1 + accumulate)
                gemm(
                    m, n, k, left.ctypes.data, left.shape[1], a_transposed, right.ctypes.data, right.shape[1],
                    b_transposed, c[1:].ctypes.data, n + pad, accumulate,
                )  # fmt: skip
                if not np.array_equal(c, expected):
                    what = "guard cells" if np.array_equal(c[1:-1, :n], expected[1:-1, :n]) else "values"
                    return f"{what} differ with transposes {a_transposed}, {b_transposed}, accumulate {accumulate}"
    return ""
