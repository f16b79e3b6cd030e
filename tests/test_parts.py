"""Parts of a plan's result: any box against relation.py, boxes on the cuts against the bits of the whole, and windows.

Lowerings are forced by name, on machines with caches so small that there are many blocks, with any schedule of those
that they compare. `_no_zeros_by_luck` fills new memory with NaN, so that a cell that no block writes shows.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import oracle
import pytest
import relation
from oracle import dtype_named, frozen, rounded, same_bits
from test_lowerings import _no_zeros_by_luck, check_cells, told  # noqa: F401  the first is a fixture
from test_relation import (
    COMPLETE,
    DTYPES,
    FAR,
    GEOMETRIES,
    LARGE,
    LAYOUTS,
    ONE,
    OPERATIONS,
    disguised,
    operands,
    overlapping,
    plans,
    problems,
    random_problem,
)

from gemmconv import plan_conv3d_transpose
from gemmconv.blas import small_products
from gemmconv.lowerings import CannotLowerError
from gemmconv.machine import Machine
from gemmconv.part import Part
from gemmconv.plan import ALGORITHMS, make_plan
from gemmconv.problem import Axis, Problem

BY_NAME = [(operation, name) for operation in OPERATIONS for name in ALGORITHMS[operation] if name != "auto"]
# The classes of schedules that each of them makes.
SCHEDULES = {
    ("conv3d_transpose", "col2im"): {"ByTaps", "ByRows", "ByPlanes"},
    ("conv3d", "im2col"): {"Im2Col"},
    ("conv3d", "kn2row"): {"Gather", "Landed"},
    ("conv3d_backprop_filter", "im2col"): {"Gradient"},
}
WIDER = {
    "float16": ["float32", "complex64"], "bfloat16": ["float32", "float64"], "float32": ["float64", "complex64"],
    "float64": ["complex128"], "complex64": ["complex128"], "complex128": ["complex128"],
}  # fmt: skip
GUARD = 1 << 20  # bytes on both sides of an array that may not be touched


def drawn_problem(rng, operation, dtype):
    """Return a small problem: any, or of single taps, taps side by side, one coarse position, or a line that is cut."""
    kind = rng.choice(["any", "points", "tiles", "single", "line"], p=[0.6, 0.1, 0.1, 0.1, 0.1])
    if kind == "any":
        return random_problem(rng, operation, dtype)[0]
    groups, cin, cout = (int(n) for n in ((1, 2, 3), (2, 3, 2), (5, 1, 1), (1, 9, 40))[rng.integers(4)])
    layout, (d, h, w) = str(rng.choice(LAYOUTS)), (int(n) for n in rng.integers(1, 6, 3))
    if kind == "points":
        axes = Axis(d, d, 1), Axis(h, h, 1), Axis(w, w, 1)
    elif kind == "tiles":
        axes, layout = tuple(Axis(n, n * s, s, s) for n, s in zip((d, h, w), (1, 2, 2), strict=True)), "NDHWC"
    elif kind == "single":
        axes, layout, groups = (Axis(1, d, d), Axis(1, h, h), Axis(1, w, w)), "NDHWC", 1
    else:
        stride, n = int(rng.integers(2, 4)), int(rng.integers(20, 80))
        kernel, lo = stride * int(rng.integers(1, 3)), int(rng.integers(-2, 4))
        axes = ONE, ONE, Axis(n, (n - 1) * stride + kernel - lo - int(rng.integers(-2, 4)), kernel, stride, 1, lo)
    return Problem(operation, int(rng.integers(1, 4)), cin, cout, axes, dtype, layout, groups)


def forced(rng, problem, name, workers=1):
    """Return a plan by a lowering, with any schedule of those it compares, on a machine with small caches; or None."""
    l2_bytes = int(rng.choice([128, 1024, 1 << 13, 1 << 16]))
    with pytest.MonkeyPatch.context() as patch:
        for where in ("plan", "lowerings.cost", "lowerings.tiling"):
            patch.setattr(f"gemmconv.{where}.total_s", lambda *_: rng.random() + 0.1)
        for more in (1, 8, 64, 512):
            try:
                return make_plan.__wrapped__(problem, Machine(2, more * l2_bytes, 1 << 20), name, workers)
            except CannotLowerError:
                continue
    return None


def made(rng, operation, name, dtypes, most_blocks, many):
    """Yield plans by a lowering for small problems that it can do, in no more than so many blocks each."""
    found = 0
    for _ in range(20 * many):
        problem = drawn_problem(rng, operation, dtype_named(dtypes[found % len(dtypes)]))
        if name == "winograd" and problem.groups == 1 and rng.random() < 0.75:
            problem = dataclasses.replace(problem, cin=16, cout=16)  # whole vectors, for small products
        if (operation, name) == ("conv3d", "kn2row") and problem.groups == 1 and rng.random() < 0.25:
            problem = dataclasses.replace(problem, cin=48, cout=48, layout="NDHWC")  # few rows of many channels
        plan = forced(rng, problem, name, 1 + found % 3) if not problem.empty else None
        if plan is not None and plan.blocks <= most_blocks:
            yield plan
            found += 1
        if found == many:
            return


def two(rng, operation):
    """Return the names of two lowerings, or 'auto' and one."""
    return [str(name) for name in rng.choice(ALGORITHMS[operation], 2, replace=False)]


def random_box(rng, shape):
    """Return a box of an array as pairs, seldom an empty one."""
    box = []
    for size in shape:
        start, stop = sorted(int(at) for at in rng.integers(0, size + 1, 2))
        if rng.random() < 0.25:
            start, stop = 0, size
        elif start == stop and size and rng.random() < 0.9:
            start = min(start, size - 1)
            stop = start + 1
        box.append((start, stop))
    return box


def box_on(rng, cuts):
    """Return a box that begins and ends at cuts, empty only along axes of size zero."""
    box = []
    for at in cuts:
        i, j = sorted(rng.choice(len(at), 2, replace=False)) if len(at) > 1 else (0, 0)
        box.append((0, at[-1]) if rng.random() < 0.25 else (at[i], at[j]))
    return box


def tiling(rng, cuts, most=16):
    """Return boxes that begin and end at cuts, and make up the whole."""
    chosen = [[*at[:1], *at[-1:]] for at in cuts]
    while math.prod(len(at) - 1 for at in chosen) <= most // 2:
        free = [(i, at) for i, of_axis in enumerate(cuts) for at in set(of_axis) - set(chosen[i])]
        if not free:
            break
        i, at = free[rng.integers(len(free))]
        chosen[i].append(at)
    return list(itertools.product(*(itertools.pairwise(sorted(at)) for at in chosen)))


def of_windows(part, first, second):
    """Return the windows of both operands that a part needs."""
    return first[part.windows[0]], second[part.windows[1]]


def normal(rng, shape, dtype):
    """Return an array of normal data, complex in both parts."""
    data = rng.standard_normal(shape)
    return (data + 1j * rng.standard_normal(shape) if dtype.kind == "c" else data).astype(dtype)


def agree(problem, first, second, got, want):
    """Return whether two results of a box are equal but for rounding of sums, and where they are not finite the same.

    The bound is of the largest sum of all, since minimal filtering adds what lies beside a cell and takes it away.
    """
    half = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(problem.dtype.name, 0)
    finite = np.isfinite(want)
    parts = [np.where(np.isfinite(array), np.abs(oracle.wide(array)), 0) for array in (first, second)]
    most = relation.result(problem, *parts).max(initial=0)
    far = np.abs(oracle.wide(got)[finite] - oracle.wide(want)[finite])
    within = 30 * float(np.finfo(problem.compute_dtype).eps) * most + 2 * half * np.abs(oracle.wide(want)[finite])
    same = problem.dtype.kind == "c" or np.array_equal(got[~finite], want[~finite], equal_nan=not finite.all())
    return (np.isfinite(got) == finite).all() and same and (far <= within).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_box_of_whole_numbers(operation, dtype):
    """The oracle's bits, from operands of any memory layout, by each lowering that can do the whole."""
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([700, OPERATIONS.index(operation), DTYPES.index(dtype.name)])
    count, grouped, filled = {True: 0, False: 0}, 0, 0
    for i in range(30):
        problem = drawn_problem(rng, operation, dtype)
        first, second, _ = operands(rng, problem, biased=False)
        if i % 4 == 0:
            first = disguised(rng, first, problem)
        if i % 4 == 2:
            second = disguised(rng, second, problem)
        want = rounded(relation.result(problem, first, second), dtype)
        for name in two(rng, operation):
            plan = forced(rng, problem, name, 1 + i % 3)
            for box in [random_box(rng, want.shape), box_on(rng, plan.cuts)] if plan else []:
                part = plan.part(box)
                windows = of_windows(part, first, second)
                before = [array.tobytes() for array in windows]
                with told(i, name, plan, box, part.windows, part.on_blocks):
                    got = part(*windows)
                    assert type(got) is np.ndarray
                    assert got.flags.c_contiguous
                    assert got.flags.writeable
                    assert got.shape == part.output_shape
                    assert same_bits(got, want[part.box])
                    assert before == [array.tobytes() for array in windows]
                count[part.on_blocks] += got.size > 0
                grouped += problem.groups > 1 and got.size > 0
                filled += got.any()
    assert min(count.values()) > 15, count
    assert grouped > 20, grouped
    assert filled > 30, filled


@pytest.mark.parametrize("operation", OPERATIONS)
def test_boxes_of_axes_that_reach_far_or_nowhere(operation):
    """Paddings, strides, dilations and sizes of any magnitude and sign."""
    rng = np.random.default_rng([701, OPERATIONS.index(operation)])
    for i, axis in enumerate(FAR):
        axes = [Axis(2, 2, 2, 1, 1, 0), ONE]
        axes.insert(i % 3, axis)
        groups, cin, cout = ((1, 2, 3), (3, 1, 1), (2, 2, 1))[i % 3]
        problem = Problem(operation, 2, cin, cout, tuple(axes), np.dtype(np.float32), LAYOUTS[i % 2], groups)
        first, second, _ = operands(rng, problem, biased=False)
        want = rounded(relation.result(problem, first, second), problem.dtype)
        for name in two(rng, operation):
            plan = forced(rng, problem, name, 2)
            for box in [random_box(rng, want.shape), box_on(rng, plan.cuts)] if plan else []:
                part = plan.part(box)
                with told(name, problem, box, part.windows, part.on_blocks):
                    assert same_bits(part(*of_windows(part, first, second)), want[part.box])


@pytest.mark.parametrize(("operation", "name"), BY_NAME)
def test_boxes_on_the_cuts_have_the_bits_of_the_whole(operation, name, monkeypatch):
    """Normal data of all dtypes, one to three workers; boxes that are off the cuts agree to rounding.

    Boxes that tile the result, written into views of one array, make up the whole, and no block is run for two of them.
    """
    monkeypatch.setattr("gemmconv.lowerings.tiling._POSITIONS", (8, 64))  # several blocks of small problems
    rng = np.random.default_rng([703, *map(ord, operation + name)])
    count, off, grouped = {}, 0, 0
    for i, plan in enumerate(made(rng, operation, name, DTYPES, 3000, 80 if name == "winograd" else 64)):
        problem = plan.problem
        first, second, *_ = (normal(rng, shape, problem.dtype) for shape in relation.shapes(problem))
        whole = plan(first, second)
        kind = type(plan.schedule).__name__
        with told(i, plan, plan.schedule, plan.cuts):
            for _ in range(3):
                part = plan.part(box_on(rng, plan.cuts))
                with told(part.bounds, part.windows):
                    assert part.on_blocks
                    assert same_bits(part(*of_windows(part, first, second)), whole[part.box])
                count[kind] = count.get(kind, 0) + (part.output_shape != whole.shape)
                grouped += problem.groups > 1
            tiled, blocks = np.empty_like(whole), []
            for box in tiling(rng, plan.cuts):
                part = plan.part(box)
                with told(part.bounds, part.windows):
                    assert part.on_blocks
                    totals = set()
                    part(*of_windows(part, first, second), tiled[part.box], progress=lambda _, n: totals.add(n))  # noqa: B023
                    blocks += totals
            assert same_bits(tiled, whole)
            assert sum(blocks) <= plan.blocks
            part = plan.part(random_box(rng, whole.shape))
            if not part.on_blocks:
                with told(part.bounds, part.windows):
                    got = part(*of_windows(part, first, second))
                    off += got.size > 0
                    assert agree(problem, first, second, got, whole[part.box])
    assert off > 2, off
    lacking = set() if small_products() else {"Landed"}  # which is for BLAS that does not pack small products
    assert set(count) >= SCHEDULES.get((operation, name), set()) - lacking
    assert min(count.values()) > 3, count
    assert grouped > 15, grouped


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_parts_of_layers(operation, case):
    """The bits of the whole in blocks of usual size, on the cuts of plans for this machine or for small caches."""
    groups, cin, cout, axes = LARGE[case]
    i = list(LARGE).index(case)
    rng = np.random.default_rng([703, i])
    problem = Problem(operation, 2, cin, cout, axes, np.dtype(np.float32), LAYOUTS[i % 2], groups)
    first, second, *_ = (normal(rng, shape, problem.dtype) for shape in relation.shapes(problem))
    found = plans(problem, 2) if (i + OPERATIONS.index(operation)) % 2 else plans(problem, 3, 1 << 16)
    for name, plan in found.items():
        whole = plan(first, second)
        for _ in range(2):
            part = plan.part(box_on(rng, plan.cuts))
            with told(name, plan, part.bounds, part.windows):
                assert part.on_blocks
                assert same_bits(part(*of_windows(part, first, second)), whole[part.box])


@pytest.mark.parametrize(("operation", "name"), BY_NAME)
def test_cuts_are_where_blocks_end(operation, name):
    """What each block of the whole writes, seen after each of them, lies between neighbouring cuts on every axis.

    There are no other such places, but where several blocks share what lies between cuts: by taps seen as channels,
    or by phases of a stride.
    """
    rng = np.random.default_rng([704, BY_NAME.index((operation, name))])
    several = exact = 0
    for i, plan in enumerate(made(rng, operation, name, ["float64"], 300, 60)):
        plan = dataclasses.replace(plan, workers=1)
        problem = plan.problem
        first, second, *_ = (normal(rng, shape, problem.dtype) for shape in relation.shapes(problem))
        out = np.full(plan.output_shape, np.nan)
        left, written = [np.isnan(out)], []

        def progress(done, total, out=out, left=left, written=written):
            now = np.isnan(out)
            written.append(np.argwhere(left[0] & ~now))
            left[0] = now

        plan(first, second, out, progress=progress)
        assert len(written) == plan.blocks
        several += sum(len(cells) > 0 for cells in written) > 2
        with told(i, plan, plan.schedule, plan.cuts):
            for at, size in zip(plan.cuts, plan.output_shape, strict=True):
                assert list(at) == sorted({0, size, *at})
            shared = plan.schedule.problem.result_shape[1:-1] != plan.output_shape[1:-1]
            shared |= any(len(digit) > 1 and not all(digit) for digit in plan.schedule.digits)
            exact += not shared
            for axis, (at, size) in enumerate(zip(plan.cuts, plan.output_shape, strict=True)):
                ends = [(cells[:, axis].min(), cells[:, axis].max()) for cells in written if len(cells)]
                free = [n for n in range(1, size) if not any(first < n <= last for first, last in ends)]
                assert set(at[1:-1]) <= set(free) if shared else list(at[1:-1]) == free, axis
    assert min(several, exact) > 5, (several, exact)


def reached(problem, box):
    """Return what a box of the result needs of the coarse and the fine array, from the definition.

    For each role and each of batch, depth, height, width and channels: the indices that some product of the box takes,
    and the interval that reaches from the first tap's place to the last one's, cut at the ends of the array.
    """
    result = relation.OPERATIONS[problem.operation][2]
    if result == "filter":
        *spatial, rows, of_coarse = box
        batch = range(problem.batch)
    else:
        batch, *spatial, channels = box if problem.layout == "NDHWC" else [box[0], *box[2:], box[1]]
        batch, rows, of_coarse = range(*batch), (0, problem.cout), channels
    each = problem.cout if result == "fine" else problem.cin
    groups = sorted({c // each for c in range(*of_coarse)})
    found = {"coarse": [(batch, batch)], "fine": [(batch, batch)]}
    for axis, (start, stop) in zip(problem.axes, spatial, strict=True):
        taps = range(start, stop) if result == "filter" else range(axis.kernel)
        coarse = range(start, stop) if result == "coarse" else range(axis.coarse)
        fine = range(start, stop) if result == "fine" else range(axis.fine)
        places = {i: [i * axis.stride + a * axis.dilation - axis.lo for a in taps] for i in coarse}
        met = [(i, p) for i, of_i in places.items() for p in of_i if p in fine]
        if result != "coarse":  # a coarse position all whose taps fall on one side is not needed
            places = {i: of_i for i, of_i in places.items() if min(of_i) < fine.stop and max(of_i) >= fine.start}
        ends = [p for of_i in places.values() for p in of_i]
        found["coarse"].append(({i for i, _ in met}, list(places)))
        found["fine"].append(({p for _, p in met}, [p for p in fine if ends and min(ends) <= p <= max(ends)]))
    for role, size, some in (("coarse", problem.cin, range(problem.cin)), ("fine", problem.cout, range(*rows))):
        if role == "coarse" and result == "filter":
            channels = range(*of_coarse)
        else:
            channels = [group * size + c for group in groups for c in some]
        found[role].append((channels, range(channels[0], channels[-1] + 1)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_windows_are_what_the_box_needs(operation, layout):
    """They hold all that some product takes, and off the blocks nothing before it or behind it; filters are whole."""
    rng = np.random.default_rng([705, OPERATIONS.index(operation), LAYOUTS.index(layout)])
    count, smaller = {True: 0, False: 0}, 0
    roles = relation.OPERATIONS[operation]
    for i in range(250):
        problem = drawn_problem(rng, operation, np.dtype(np.float32))
        if problem.layout != layout or problem.empty:
            continue
        plan = forced(rng, problem, str(rng.choice(ALGORITHMS[operation])))
        for box in [random_box(rng, relation.shapes(problem)[2]), box_on(rng, plan.cuts)] if plan else []:
            part = plan.part(box)
            if 0 in part.output_shape:
                continue
            count[part.on_blocks] += 1
            needed = reached(problem, box)
            with told(i, plan, box, part.windows, part.on_blocks):
                for role, window, shape in zip(roles, part.windows, relation.shapes(problem), strict=False):
                    assert all(0 <= s.start <= s.stop <= size for s, size in zip(window, shape, strict=True))
                    if role == "filter":
                        assert window == tuple(slice(0, size) for size in shape)
                        continue
                    smaller += math.prod(s.stop - s.start for s in window) < math.prod(shape)
                    by_meaning = window if layout == "NDHWC" else [window[0], *window[2:], window[1]]
                    for axis, (span, (some, between)) in enumerate(zip(by_meaning, needed[role], strict=True)):
                        inside = range(span.start, span.stop)
                        assert set(some) <= set(inside)
                        exact = not part.on_blocks or axis == 0 or (axis == 4 and roles[2] == "filter")
                        assert not exact or list(inside) == list(between)
    assert min(count.values()) > 30, count
    assert smaller > 30


def guarded(array, at_end, writeable):
    """Return a copy of an array at the end or the beginning of pages whose neighbours may not be touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    inner = -(-max(1, array.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inner + 2 * GUARD)
    start = GUARD + (inner - array.nbytes if at_end else 0)
    found = np.frombuffer(memory, np.uint8)[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    at = np.frombuffer(memory, np.uint8).ctypes.data
    none, read = 0, mmap.PROT_READ
    for place, size, allowed in ((0, GUARD, none), (GUARD, inner, read), (GUARD + inner, GUARD, none)):
        if (allowed == none or not writeable) and libc.mprotect(at + place, size, allowed):
            raise OSError(ctypes.get_errno(), "mprotect")
    return found


def run_guarded(operation):
    """Compute parts from and into memory whose neighbours may not be touched; say before each what it is."""
    rng = np.random.default_rng([706, OPERATIONS.index(operation)])
    dtypes = [name for name in DTYPES if name != "bfloat16"]
    count = {True: 0, False: 0}
    for i in range(64):
        problem = drawn_problem(rng, operation, np.dtype(dtypes[i % 5]))
        first, second, _ = operands(rng, problem, biased=False)
        if i % 10 == 0 and first.size:
            first[tuple(int(rng.integers(n)) for n in first.shape)] = np.nan
        want = rounded(relation.result(problem, first, second), problem.dtype)
        for name in two(rng, operation):
            plan = forced(rng, problem, name, 1 + i % 2)
            for box in [random_box(rng, want.shape), box_on(rng, plan.cuts), box_on(rng, plan.cuts)] if plan else []:
                part = plan.part(box)
                print(i, name, problem, plan.schedule, box, part.windows, part.on_blocks, flush=True)
                at_end = bool(rng.integers(2))
                out = guarded(np.full(part.output_shape, 77, problem.dtype), at_end, True)
                windows = [guarded(window, at_end, False) for window in of_windows(part, first, second)]
                assert part(*windows, out) is out
                check_cells(out, want[part.box])
                count[part.on_blocks] += 1
    assert min(count.values()) > 40, count


def alone(code):
    """Return what becomes of a process that runs some code of this module."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-X", "faulthandler", "-c", f"import test_parts\n{code}"]
    environ = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="Pages are protected by Linux's libc.")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_memory_beside_the_windows_is_touched(operation):
    """Nor is a window written to. Results are the whole's, where it has NaN too."""
    done = alone(f"test_parts.run_guarded({operation!r})")
    if done.returncode:
        pytest.fail(f"exit code {done.returncode} at\n{done.stdout[-3000:]}\n{done.stderr}", pytrace=False)


@pytest.mark.skipif(sys.platform != "linux", reason="Pages are protected by Linux's libc.")
@pytest.mark.parametrize("access", ["before", "behind", "write"])
def test_guarded_memory_cannot_be_touched(access):
    """Else the test above could not fail."""
    code = {
        "before": "ctypes.string_at(test_parts.guarded(a, False, True).ctypes.data - 1, 1)",
        "behind": "ctypes.string_at(test_parts.guarded(a, True, True).ctypes.data + a.nbytes, 1)",
        "write": "test_parts.guarded(a, True, False)[...] = 2",
    }[access]
    before = "import ctypes, numpy as np\na = np.ones(999)\nprint(test_parts.guarded(a, True, False).sum())\n"
    done = alone(before + code)
    assert done.stdout == "999.0\n"
    assert done.returncode == -signal.SIGSEGV, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_as_a_view_of_a_larger_array(operation, dtype):
    """Of the plan's dtype or a wider one, in steps or not: `out` is returned, and nothing but its cells changes."""
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([707, OPERATIONS.index(operation), DTYPES.index(dtype.name)])
    for i, geometry in enumerate(GEOMETRIES):
        problem = problems(operation, dtype, geometry)[rng.integers(6)]
        first, second, _ = operands(rng, problem, biased=False)
        want = rounded(relation.result(problem, first, second), dtype)
        for name in two(rng, operation):
            plan = forced(rng, problem, name, 1 + i % 2)
            for box in [random_box(rng, want.shape), box_on(rng, plan.cuts)] if plan else []:
                part = plan.part(box)
                wider = dtype_named(str(rng.choice([dtype.name, *WIDER[dtype.name]])))
                step, before = int(rng.choice([1, 1, 2, -1])), int(rng.integers(2))
                memory = np.full([before + n * abs(step) for n in want.shape], 77, wider)
                inner = memory[(slice(before, None),) * 5]
                whole = inner[..., ::step][..., : want.shape[-1]]
                expected = memory.copy()
                cells = expected[(slice(before, None),) * 5][..., ::step][..., : want.shape[-1]]
                cells[part.box] = want[part.box]
                out = whole[part.box]
                with told(i, plan, box, wider, step):
                    assert part(*of_windows(part, first, second), out) is out
                    assert same_bits(memory, expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out_overlaps_windows(operation):
    """`out` in the memory of a window, shifted, reversed or interleaved: as if they were apart."""
    rng = np.random.default_rng([708, OPERATIONS.index(operation)])
    for i, geometry in enumerate(GEOMETRIES):
        dtype = ("float32", "complex64", "float16")[i % 3]
        problem = problems(operation, np.dtype(dtype), geometry)[rng.integers(6)]
        first, second, _ = operands(rng, problem, biased=False)
        want = rounded(relation.result(problem, first, second), dtype)
        for name, which, step in itertools.product(two(rng, operation), (0, 1, "all"), (1, -1, 2)):
            plan = forced(rng, problem, name, 1 + i % 2)
            if plan is None:
                continue
            part = plan.part(box_on(rng, plan.cuts) if rng.random() < 0.5 else random_box(rng, want.shape))
            if 0 in part.output_shape:
                continue
            windows = of_windows(part, first, second)
            *pair, _, out = overlapping(rng, (*windows, None), part.output_shape, which, step)
            with told(plan, part.bounds, part.on_blocks, which, step):
                assert part(*pair, out) is out
                assert same_bits(np.ascontiguousarray(out), want[part.box])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nan_and_inf_reach_what_they_reach_in_the_whole(operation, dtype):
    """Single cells and whole groups of both operands, in whole numbers: the oracle's cells. Nothing warns."""
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([709, OPERATIONS.index(operation), DTYPES.index(dtype.name)])
    count = dict.fromkeys(itertools.product((True, False), repeat=2), 0)
    for i, geometry in enumerate(2 * GEOMETRIES):
        places = ("first", "second", "first second", "group")[(i + DTYPES.index(dtype.name)) % 4]
        problem = problems(operation, dtype, geometry)[rng.integers(6)]
        first, second, _ = operands(rng, problem, 4, biased=False)
        for place in places.split():
            array = first if place == "first" else second
            cell = [int(rng.integers(n)) for n in array.shape]
            if place == "group":
                role = relation.OPERATIONS[operation][1]
                size = problem.cin if role != "fine" else problem.cout
                group = int(rng.integers(problem.groups))
                cell = [slice(None)] * 5
                channel = 4 if role == "filter" else problem.layout.index("C")
                cell[channel] = slice(group * size, group * size + size)
            array[tuple(cell)] = rng.choice([np.nan, np.inf, -np.inf])
        want = rounded(relation.result(problem, first, second), dtype)
        for name in two(rng, operation):
            plan = forced(rng, problem, name, 2)
            for box in [random_box(rng, want.shape), box_on(rng, plan.cuts)] if plan else []:
                part = plan.part(box)
                with told(places, plan, plan.schedule, box, part.on_blocks), np.errstate(all="raise"):
                    got = part(*of_windows(part, first, second))
                    check_cells(got, want[part.box])
                count[part.on_blocks, bool(np.isfinite(got).all())] += 1
    assert min(count.values()) > 0, count


@pytest.mark.parametrize(("operation", "name"), BY_NAME)
def test_parts_of_results_that_are_not_finite(operation, name):
    """Normal data with NaN or Inf in a few cells: what the whole has, though a part's window may hold none of them."""
    rng = np.random.default_rng([710, BY_NAME.index((operation, name))])
    mixed = clean = 0
    for i in range(28):
        problem = problems(operation, np.dtype(DTYPES[2 + i % 4]), GEOMETRIES[i % len(GEOMETRIES)])[rng.integers(6)]
        plan = forced(rng, problem, name, 1 + i % 3)
        if plan is None:
            continue
        first, second, *_ = (normal(rng, shape, problem.dtype) for shape in relation.shapes(problem))
        array = second if i % 5 == 0 else first
        array[tuple(int(rng.integers(n)) for n in array.shape)] = (np.nan, np.inf, -np.inf)[i % 3]
        whole = plan(first, second)
        for box in (random_box(rng, whole.shape), box_on(rng, plan.cuts), box_on(rng, plan.cuts)):
            part = plan.part(box)
            with told(i, plan, plan.schedule, box, part.on_blocks):
                got = part(*of_windows(part, first, second))
                finite = np.isfinite(got)
                mixed += finite.any() and not finite.all()
                clean += finite.all()
                assert agree(problem, first, second, got, whole[part.box])
    assert min(mixed, clean) > 3, (mixed, clean)


@pytest.mark.parametrize(("operation", "name"), BY_NAME)
def test_parts_whose_filtered_operands_would_overflow(operation, name):
    """Values near the largest, whose differences overflow, and filters that bring results back: the oracle's bits."""
    rng = np.random.default_rng([711, BY_NAME.index((operation, name))])
    done = 0
    for i in range(28):
        problem = problems(operation, np.dtype(np.float32), GEOMETRIES[i % len(GEOMETRIES)])[rng.integers(6)]
        plan = forced(rng, problem, name, 1 + i % 3)
        if plan is None:
            continue
        first, second, _ = operands(rng, problem, 4, biased=False)
        want = rounded(relation.result(problem, first, second) * 2.0**95, problem.dtype)
        first, second = first * np.float32(2.0**125), second * np.float32(2.0**-30)
        for box in (random_box(rng, want.shape), box_on(rng, plan.cuts)):
            part = plan.part(box)
            with told(i, plan, plan.schedule, box, part.on_blocks):
                assert same_bits(part(*of_windows(part, first, second)), want[part.box])
                done += part.on_blocks
    assert done > 3, done


def plan_of(operation="conv3d_transpose", layout="NDHWC"):
    """Return a plan of 2 images, 4x5x6 coarse and 8x10x12 fine positions, 2 groups of 3 coarse and 4 fine channels."""
    axes = (Axis(4, 8, 2, 2), Axis(5, 10, 2, 2), Axis(6, 12, 2, 2))
    problem = Problem(operation, 2, 3, 4, axes, np.dtype(np.float32), layout, 2)
    return make_plan(problem, Machine(2, 1024, 1 << 20), COMPLETE[operation], 2)


def whole_but(axis, span):
    """Return a box of the result of `plan_of()`, whole on all axes but one."""
    box = [(0, 2), (0, 8), (0, 10), (0, 12), (0, 8)]
    box[axis] = span
    return box


BOXES = {
    "short": (ValueError, "box must have 5 slices or pairs, one for each axis of (2, 8, 10, 12, 8), got 4",
              [(0, 1)] * 4),
    "long": (ValueError, "box must have 5 slices or pairs, one for each axis of (2, 8, 10, 12, 8), got 6",
             [(0, 1)] * 6),
    "none": (ValueError, "box must have 5 slices or pairs, one for each axis of (2, 8, 10, 12, 8), got 0", ()),
    "no box": (TypeError, "box must be a sequence of 5 slices or pairs, got None", None),
    "number": (TypeError, "box must be a sequence of 5 slices or pairs, got 5", 5),
    "text": (TypeError, "box must be a sequence of 5 slices or pairs, got 'boxes'", "boxes"),
    "one slice": (TypeError, "box must be a sequence of 5 slices or pairs, got slice(0, 2, None)", slice(0, 2)),
    "reversed": (ValueError, "box[1]=[5, 2] must be an interval within 0 and 8, axis 1 of (2, 8, 10, 12, 8)",
                 whole_but(1, (5, 2))),
    "reversed slice": (ValueError, "box[2]=[5, 2] must be an interval within 0 and 10, axis 2 of (2, 8, 10, 12, 8)",
                       whole_but(2, slice(5, 2))),
    "behind": (ValueError, "box[3]=[0, 13] must be an interval within 0 and 12, axis 3 of (2, 8, 10, 12, 8)",
               whole_but(3, (0, 13))),
    "far": (ValueError, "box[4]=[9, 9] must be an interval within 0 and 8, axis 4 of (2, 8, 10, 12, 8)",
            whole_but(4, (9, 9))),
    "slice behind": (ValueError, "box[0]=[3, 2] must be an interval within 0 and 2, axis 0 of (2, 8, 10, 12, 8)",
                     whole_but(0, slice(3, None))),
    "negative": (ValueError, "box[1]=[-1, 3] must be an interval within 0 and 8, axis 1 of (2, 8, 10, 12, 8)",
                 whole_but(1, (-1, 3))),
    "from the end": (ValueError, "box[1]=[-3, 8] must be an interval within 0 and 8, axis 1 of (2, 8, 10, 12, 8)",
                     whole_but(1, slice(-3, None))),
    "to the end": (ValueError, "box[1]=[0, -1] must be an interval within 0 and 8, axis 1 of (2, 8, 10, 12, 8)",
                   whole_but(1, slice(None, -1))),
    "step": (ValueError, "box[1] must have a step of 1, got slice(0, 8, 2)", whole_but(1, slice(0, 8, 2))),
    "backwards": (ValueError, "box[1] must have a step of 1, got slice(7, None, -1)", whole_but(1, slice(7, None, -1))),
    "one": (ValueError, "box[1] must be 2 integers, first and behind the last, got 1: [3]", whole_but(1, (3,))),
    "three": (ValueError, "box[1] must be 2 integers, first and behind the last, got 3: [0, 4, 1]",
              whole_but(1, (0, 4, 1))),
    "index": (TypeError, "box[1] must be a sequence of integers, got 3 of type int", whole_but(1, 3)),
    "dots": (TypeError, "box[1] must be a sequence of integers, got Ellipsis of type ellipsis", whole_but(1, ...)),
    "nested": (ValueError, "box[1] must be one-dimensional, but box[1][0] is [0]", whole_but(1, [[0], [1]])),
    "float": (TypeError, "box[1][0] must be an integer, got 0.0 of type float", whole_but(1, (0.0, 3))),
    "slice of float": (TypeError, "box[1][1] must be an integer, got 2.5 of type float", whole_but(1, slice(0, 2.5))),
    "floats": (TypeError, "box[0][0] must be an integer, got np.float64(0.0) of type float64", np.zeros((5, 2))),
    "bool": (TypeError, "box[1][0] must be an integer, got the bool True", whole_but(1, (True, 3))),
    "slice of bool": (TypeError, "box[1][1] must be an integer, got the bool True", whole_but(1, slice(0, True))),
}  # fmt: skip


@pytest.mark.parametrize("case", BOXES)
def test_boxes_that_are_refused(case):
    """Each with its numbers and the axis."""
    exception, text, box = BOXES[case]
    with pytest.raises(exception, match=f"^{re.escape('plan of conv3d_transpose: ' + text)}$"):
        plan_of().part(box)


def test_forms_of_boxes():
    """Slices with and without ends, pairs of any integers, arrays; all give the same part as slices of the result."""
    plan = plan_of()
    bounds = ((0, 2), (2, 8), (0, 4), (0, 12), (4, 6))
    forms = [
        bounds,
        [list(pair) for pair in bounds],
        np.array(bounds),
        np.array(bounds, np.uint8),
        [slice(None), slice(2, None), slice(4), slice(None, None, 1), slice(np.int64(4), 6)],
        (slice(0, 2), (np.int8(2), 8), np.array([0, 4]), [0, 12], (4, np.uint64(6))),
    ]
    for box in forms:
        part = plan.part(box)
        assert type(part) is Part
        assert part.bounds == bounds
        assert all(type(at) is int for pair in part.bounds for at in pair)
        assert part.box == tuple(slice(*pair) for pair in bounds)
        assert part.output_shape == (2, 6, 4, 12, 2)
        assert part.plan is plan


@pytest.mark.parametrize("on_blocks", [True, False])
def test_arguments_that_are_refused(on_blocks):
    """Windows and `out` of another shape or dtype: with the numbers, and nothing was touched."""
    plan = plan_of()
    part = plan.part(whole_but(1, (0, plan.cuts[1][1]) if on_blocks else (3, 5)))
    assert part.on_blocks is on_blocks
    shape = part.output_shape
    x, w = (np.ones(size, np.float32) for size in plan.problem.operand_shapes)
    value, filter = of_windows(part, x, w)
    good = np.full(shape, 77, np.float32)
    larger, fewer = (2, 8, 10, 12, 8), (*shape[:4], 7)
    cases = [
        (ValueError, f"value has shape {value[:1].shape}, but .* {value.shape}", value[:1], filter, good),
        (ValueError, f"value has shape {value.shape[1:]}, but .* {value.shape}", value[0], filter, good),
        (ValueError, f"filter has shape (2, 2, 2, 4, 5), but .* {w.shape}", value, filter[..., :5], good),
        (ValueError, f"filter has shape (1, 2, 2, 4, 6), but .* {w.shape}", value, filter[:1], good),
        (TypeError, "value of float64 and filter of float32 give float64, but .* float32",
         value.astype("f8"), filter, good),
        (TypeError, "value of float16 and filter of float16 give float16, but .* float32",
         value.astype("f2"), filter.astype("f2"), good),
        (TypeError, "value has dtype int64; integers", value.astype("i8"), filter, good),
        (TypeError, "filter is a masked array", value, np.ma.masked_array(filter), good),
        (ValueError, f"out has shape {larger}, but the result has {shape}", value, filter, np.full(larger, 77, "f4")),
        (ValueError, f"out has shape {fewer}, but the result has {shape}", value, filter, good[..., :7]),
        (TypeError, "out has dtype float16, to which the result's float32", value, filter, good.astype("f2")),
        (TypeError, "out has dtype int64, to which the result's float32", value, filter, good.astype("i8")),
        (TypeError, "out must be a numpy.ndarray, got builtins.list", value, filter, good.tolist()),
        (ValueError, f"out is read-only, but the result of shape {shape}", value, filter, frozen(good.copy())),
    ]  # fmt: skip
    for exception, text, first, second, out in cases:
        before = np.array(out)
        pattern = re.escape(text).replace(r"\.\*", ".*")
        with told(text), pytest.raises(exception, match="^part of conv3d_transpose: " + pattern):
            part(first, second, out)
        assert same_bits(np.array(out), before)
    assert part(value.tolist(), filter, good) is good
    assert same_bits(good, plan(x, w)[part.box])


def test_a_prepared_layer_that_is_read_where_blas_has_other_kernels(tmp_path):
    """It is packed anew, since the schedule may be another one."""
    rng = np.random.default_rng(17)
    value, filter = (normal(rng, shape, np.dtype("f4")) for shape in ((1, 16, 16, 16, 64), (4, 4, 4, 64, 64)))
    layer = plan_conv3d_transpose(value.shape, filter.shape, strides=2, algorithm="winograd").prepare(filter)
    assert same_bits(pickle.loads(pickle.dumps(layer))(value), layer(value))
    (tmp_path / "layer").write_bytes(pickle.dumps((layer, value)))
    code = (
        "import pickle, sys, numpy as np\n"
        "layer, value = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "assert np.array_equal(layer(value), layer.plan(value, layer.filter))\n"
    )
    own = {name: text for name, text in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    for environment in (own, own | {"OPENBLAS_CORETYPE": "Nehalem"}):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "layer")], env=environment, check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_pickles(operation, dtype):
    """Of a part before and after its first call, and of its plan: the same box, windows and bits."""
    dtype = dtype_named(dtype)
    rng = np.random.default_rng([712, DTYPES.index(dtype.name)])
    for i, name in enumerate(ALGORITHMS[operation]):
        layout = LAYOUTS[(i + DTYPES.index(dtype.name)) % 2]
        problem = Problem(operation, 2, 3, 4, GEOMETRIES[1], dtype, layout, 2)
        first, second, *_ = (normal(rng, shape, dtype) for shape in relation.shapes(problem))
        with contextlib.suppress(CannotLowerError):
            plan = make_plan(problem, Machine(2, 1 << 14, 1 << 20), name, 2)
            whole = plan(first, second)
            other = pickle.loads(pickle.dumps(plan))
            assert other == plan
            assert other.cuts == plan.cuts
            for box in (box_on(rng, plan.cuts), random_box(rng, whole.shape)):
                part = plan.part(box)
                early = pickle.loads(pickle.dumps(part))
                got = part(*of_windows(part, first, second))
                late = pickle.loads(pickle.dumps(part))
                assert len(pickle.dumps(part)) < 2000
                for copy in (early, late, other.part(box)):
                    assert copy.bounds == part.bounds
                    assert copy.windows == part.windows
                    assert copy.on_blocks == part.on_blocks
                    assert same_bits(copy(*of_windows(copy, first, second)), got)
                if part.on_blocks:
                    assert same_bits(got, whole[part.box])


def test_parts_in_a_spawned_process():
    """Parts on the cuts and off them, and plans, are sent there and called: the bits they have here."""
    rng = np.random.default_rng(713)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        for operation, layout in itertools.product(OPERATIONS, LAYOUTS):
            plan = plan_of(operation, layout)
            first, second = (normal(rng, shape, plan.dtype) for shape in plan.problem.operand_shapes)
            whole = plan(first, second)
            assert same_bits(pool.submit(plan, first, second).result(), whole)
            for box in (box_on(rng, plan.cuts), random_box(rng, whole.shape)):
                part = plan.part(box)
                windows = of_windows(part, first, second)
                got = pool.submit(part, *windows).result()
                assert same_bits(got, part(*windows))
                assert not part.on_blocks or same_bits(got, whole[part.box])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_boxes(operation):
    """Of no cells, at any place and on any axes: an empty array, from windows that are boxes of the operands."""
    rng = np.random.default_rng([714, OPERATIONS.index(operation)])
    for i in range(60):
        problem, _ = random_problem(rng, operation, np.dtype(np.float32))
        first, second, _ = operands(rng, problem, biased=False)
        shape = relation.shapes(problem)[2]
        plan = forced(rng, problem, ALGORITHMS[operation][i % 2])
        box = random_box(rng, shape)
        for axis in rng.choice(5, int(rng.integers(1, 6)), replace=False):
            box[axis] = (int(rng.integers(shape[axis] + 1)),) * 2
        part = plan.part(box)
        with told(plan, box, part.windows):
            assert not part.on_blocks
            assert part.workspace_bytes == 0
            for window, array in zip(part.windows, (first, second), strict=True):
                assert all(0 <= s.start <= s.stop <= size for s, size in zip(window, array.shape, strict=True))
            got = part(*of_windows(part, first, second))
            assert got.shape == part.output_shape
            assert got.dtype == problem.dtype
            out = np.full([n + 1 for n in shape], 77, np.float64)
            view = out[part.box]
            assert part(*of_windows(part, first, second), view) is view
            assert (out == 77).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("operation", "axis", "span"),
    [
        ("conv3d_transpose", Axis(3, 30, 2, 4, 1, -10), (0, 10)),  # before what is reached
        ("conv3d_transpose", Axis(3, 30, 2, 4, 1, -10), (20, 30)),
        ("conv3d_transpose", Axis(3, 30, 2, 4, 1, -10), (12, 14)),  # between taps
        ("conv3d", Axis(20, 9, 2, 1, 1, 5), (0, 4)),  # what reaches before the fine positions, and behind them
        ("conv3d", Axis(20, 9, 2, 1, 1, 5), (14, 20)),
        ("conv3d_backprop_filter", Axis(6, 5, 40, 1, 1, 20), (0, 15)),  # taps that meet nothing
        ("conv3d_backprop_filter", Axis(6, 5, 40, 1, 1, 20), (25, 40)),
    ],
)
def test_boxes_that_nothing_reaches(operation, axis, span, layout):
    """Zeros, whatever `out` held and the operands hold, from windows that are empty along that axis or are not used."""
    for place, (groups, dtype) in itertools.product(range(3), ((1, "float16"), (2, "float32"))):
        axes = [Axis(4, 4, 3, 1, 1, 1)] * 3
        axes[place] = axis
        problem = Problem(operation, 2, 2, 3, tuple(axes), np.dtype(dtype), layout, groups)
        at = place + (operation != "conv3d_backprop_filter" and 1 + (layout == "NCDHW"))
        for name, plan in plans(problem, 2, 4096).items():
            box = [(0, n) for n in plan.output_shape]
            box[at] = span
            part = plan.part(box)
            windows = [np.full(s, np.nan, dtype)[w] for s, w in zip(problem.operand_shapes, part.windows, strict=True)]
            out = np.full(part.output_shape, np.nan, dtype)
            with told(name, plan, part.windows):
                assert part(*windows, out) is out
                assert same_bits(out, np.zeros_like(out))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_plans_without_products(operation):
    """Sizes of zero, alone or with another: boxes are zeros or empty, and cut nowhere but at the ends."""
    rng = np.random.default_rng([715, OPERATIONS.index(operation)])
    field, grid = {"batch": 2, "cin": 2, "cout": 3}, {"coarse": 2, "fine": 3, "kernel": 2}
    places = [*field, *itertools.product(range(3), grid)]
    filled = 0
    for zeros in [*itertools.combinations(places, 1), *itertools.combinations(places, 2)]:
        sizes = {name: 0 if name in zeros else size for name, size in field.items()}
        axes = tuple(Axis(*(0 if (i, name) in zeros else size for name, size in grid.items())) for i in range(3))
        problem = Problem(operation, **sizes, axes=axes, dtype=np.dtype(np.float32), groups=int(rng.integers(1, 4)))
        first, second, shape = (np.full(s, np.nan, np.float32) for s in relation.shapes(problem))
        plan = make_plan(problem, Machine(2, 4096, 1 << 20), "auto", 1)
        assert plan.schedule is None
        assert plan.cuts == tuple(tuple(sorted({0, n})) for n in shape.shape)
        for copy, box in itertools.product((plan, pickle.loads(pickle.dumps(plan))), (None, 1, 2)):
            part = copy.part(random_box(rng, shape.shape) if box else [slice(None)] * 5)
            out = np.full(part.output_shape, np.nan, np.float32)
            with told(problem, part.bounds, part.windows):
                assert not part.on_blocks
                assert part(*of_windows(part, first, second), out) is out
                assert same_bits(out, np.zeros_like(out))
            filled += out.size > 0
    assert filled > 30


@pytest.mark.parametrize("operation", OPERATIONS)
def test_progress_and_workspace(operation):
    """One call for each block of the part, of all parts together the plan's; the whole as a part takes its memory."""
    plan = plan_of(operation)
    first, second = (np.ones(shape, np.float32) for shape in plan.problem.operand_shapes)
    cells = list(itertools.product(*map(itertools.pairwise, plan.cuts)))
    assert len(cells) > 1
    found = []
    for box in [[slice(None)] * 5, *cells]:
        seen = []
        part = plan.part(box)
        part(*of_windows(part, first, second), progress=lambda *now: seen.append(now))  # noqa: B023
        assert sorted(seen) == [(i + 1, len(seen)) for i in range(len(seen))]
        assert 0 < part.workspace_bytes <= plan.workspace_bytes
        found.append(len(seen))
    assert found[0] == plan.blocks == sum(found[1:])
    assert plan.part([slice(None)] * 5).workspace_bytes == plan.workspace_bytes


def test_threads_share_a_part():
    """Four threads make the first calls of one part at the same time, each with operands of its own."""
    rng = np.random.default_rng(716)
    for operation, on_blocks in itertools.product(OPERATIONS, (True, False)):
        plan = plan_of(operation)
        part = plan.part(box_on(rng, plan.cuts) if on_blocks else [(1, 2)] * 5)
        tasks = [operands(rng, plan.problem, biased=False)[:2] for _ in range(4)]
        wants = [rounded(relation.result(plan.problem, *task), np.float32)[part.box] for task in tasks]
        start, agreed = threading.Barrier(4), []

        def target(i, part=part, tasks=tasks, wants=wants, start=start, agreed=agreed):
            start.wait()
            agreed.extend(same_bits(part(*of_windows(part, *tasks[i])), wants[i]) for _ in range(5))

        threads = [threading.Thread(target=target, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert agreed == [True] * 20, (operation, on_blocks)
