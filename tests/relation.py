"""The three operations over one relation of two grids, by their definition: loops over taps in float64.

Tap a of coarse position i meets fine position p = i*stride + a*dilation - lo, and with f and c for the channels of the
fine and the coarse array in one group g, w being [tap, f, g, c]:

    conv3d_transpose        fine[b, p, g, f]   += coarse[b, i, g, c] * w[a, f, g, c]
    conv3d                  coarse[b, i, g, c] += fine[b, p, g, f] * w[a, f, g, c]
    conv3d_backprop_filter  w[a, f, g, c]      += fine[b, p, g, f] * coarse[b, i, g, c]

It must not import or copy anything of the package. A problem is anything with the attributes of the package's Problem
that are fields; arrays are five-dimensional, in the problem's layout. Nothing here refuses anything.
"""

import itertools

import numpy as np
from oracle import caller_order, channels_last, wide

OPERATIONS = {
    "conv3d_transpose": ("coarse", "filter", "fine"),
    "conv3d": ("fine", "filter", "coarse"),
    "conv3d_backprop_filter": ("fine", "coarse", "filter"),
}
# b is the batch, x, y, z are positions.
PRODUCTS = {
    "conv3d_transpose": "bxyzgc,fgc->bxyzgf",
    "conv3d": "bxyzgf,fgc->bxyzgc",
    "conv3d_backprop_filter": "bxyzgf,bxyzgc->fgc",
}


def split_shapes(problem):
    """Return the shapes of the three arrays with groups and channels apart, channels last."""
    coarse, fine, kernel = ([getattr(axis, name) for axis in problem.axes] for name in ("coarse", "fine", "kernel"))
    return {
        "coarse": [problem.batch, *coarse, problem.groups, problem.cin],
        "fine": [problem.batch, *fine, problem.groups, problem.cout],
        "filter": [*kernel, problem.cout, problem.groups, problem.cin],
    }


def shapes(problem):
    """Return the shapes of both operands and of the result, as the package takes them."""
    found = {}
    for role, (*rest, groups, channels) in split_shapes(problem).items():
        joined = [*rest, groups * channels]
        found[role] = tuple(joined if role == "filter" else caller_order(joined, problem.layout))
    return tuple(found[role] for role in OPERATIONS[problem.operation])


def meetings(axis, tap):
    """Return the coarse positions that a tap carries into the fine grid, and where to, as two slices."""
    met = [(i, i * axis.stride + tap * axis.dilation - axis.lo) for i in range(axis.coarse)]
    met = [(i, p) for i, p in met if 0 <= p < axis.fine]
    if not met:
        return slice(0, 0), slice(0, 0)
    (first_i, first_p), (last_i, last_p) = met[0], met[-1]
    return slice(first_i, last_i + 1), slice(first_p, last_p + 1, axis.stride)


def result(problem, first, second, bias=None):
    """Return the result in float64, or in complex128 if an operand is complex.

    Every product is formed and added by itself (einsum without BLAS), so that NaN and Inf reach what they should.
    """
    layout, roles, split = problem.layout, OPERATIONS[problem.operation], split_shapes(problem)
    arrays = {}
    for role, array in zip(roles, (first, second), strict=False):
        array = wide(array)
        arrays[role] = (array if role == "filter" else channels_last(array, layout)).reshape(split[role])
    arrays[roles[2]] = total = np.zeros(split[roles[2]], np.result_type(*arrays.values()))
    with np.errstate(all="ignore"):
        for tap in itertools.product(*(range(axis.kernel) for axis in problem.axes)):
            coarse, fine = zip(*(meetings(axis, a) for axis, a in zip(problem.axes, tap, strict=True)), strict=True)
            parts = {"coarse": (slice(None), *coarse), "fine": (slice(None), *fine), "filter": tap}
            left, right, to = (arrays[role][parts[role]] for role in roles)
            to += np.einsum(PRODUCTS[problem.operation], left, right)
        total = total.reshape(*total.shape[:-2], total.shape[-2] * total.shape[-1])
        if bias is not None:
            total = total + wide(bias)
    return total if roles[2] == "filter" else caller_order(total, layout)
