"""Blocks are recorded the second time they are run and played from then on: to the same bits, for operands anywhere."""

import gc
import time
import weakref
from functools import partial

import numpy as np
import oracle
import pytest
import relation
from numpy.lib.stride_tricks import as_strided
from oracle import same_bits

import gemmconv
from gemmconv import running
from gemmconv.compat import torch
from gemmconv.lowerings import NotFiniteError, Operands, Workspace, recorder, steps, tape
from gemmconv.lowerings.copies import need_finite
from gemmconv.profile import Clock

F4 = np.dtype(np.float32)
STEPS = ((0, 0, 0, 0, 1),) * 3


@pytest.fixture(autouse=True)
def as_it_is(tape_checked, monkeypatch):
    """Undo what is done to all other tests."""
    monkeypatch.setattr(tape.Tapes, "_do", tape_checked)
    gemmconv.clear_cache()


@pytest.fixture
def counts(monkeypatch):
    """Count recorded and played blocks."""
    found = {"recorded": 0, "played": 0}
    record, play = recorder.Recorder.recording, tape.play

    def recording(self):
        found["recorded"] += 1
        return record(self)

    def played(of_block, workspace):
        found["played"] += 1
        play(of_block, workspace)

    monkeypatch.setattr(recorder.Recorder, "recording", recording)
    monkeypatch.setattr(tape, "play", played)
    return found


def drawn(rng, shape):
    return rng.integers(-8, 9, shape).astype("f4")


class Schedule:
    """Two blocks, each of four values of the output, by any function of its operands and workspace."""

    count = 2

    def __init__(self, function):
        self.function = function
        self.runs = 0

    def run(self, index, operands, workspace):
        self.runs += 1
        workspace.reset()
        self.function(slice(4 * index, 4 * index + 4), operands, workspace)


def operands_of(rng, bias=None):
    value, filter = drawn(rng, 8), drawn(rng, 8)
    return Operands(value, filter, np.full(8, 99, F4), np.empty(0, F4), STEPS, bias)


def run_four_times(rng, function):
    """Run a block that adds value and filter, and return its schedule."""
    schedule = Schedule(function)
    tapes, workspace = tape.Tapes(schedule), Workspace(256, F4)
    for _ in range(4):
        operands = operands_of(rng)
        tapes.run(0, operands, workspace)
        assert same_bits(operands.output[:4], (operands.value + operands.filter)[:4])
    return schedule


def adds(mine, operands, workspace):
    """Add value and filter, by way of the workspace and of an array that is made."""
    sums, made = workspace.take(4), np.empty(4, F4)
    np.copyto(sums, operands.value[mine])
    np.add(sums, operands.filter[mine], out=made)
    workspace.mark("gemm")
    operands.output[mine] = made[::-1]
    if operands.bias is not None:
        operands.output[mine] += operands.start((0, 1))
    workspace.mark("store")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize("operation", sorted(relation.OPERATIONS))
def test_from_the_third_call_on_blocks_are_played_with_other_operands(operation, layout, workers, counts):
    rng = np.random.default_rng(1)
    fine, coarse = (oracle.caller_order([2, *sizes, 8], layout) for sizes in ((9, 10, 11), (5, 5, 6)))
    how = {
        "strides": oracle.caller_order([1, 2, 2, 2, 1], layout), "padding": "SAME", "data_format": layout,
        "workers": workers,
    }  # fmt: skip

    def call(dtype, x, y, w):
        x, y, w = (array.astype(dtype) for array in (x, y, w))
        if operation == "conv3d_transpose":
            return gemmconv.conv3d_transpose(y, w, fine, **how)
        if operation == "conv3d":
            return gemmconv.conv3d(x, w, **how)
        return gemmconv.conv3d_backprop_filter_v2(x, w.shape, y, **how)

    def counted():
        arrays = drawn(rng, fine), drawn(rng, coarse), drawn(rng, (3, 3, 3, 8, 8))
        want = call("f8", *arrays).astype("f4")
        counts.update(recorded=0, played=0)
        assert same_bits(call("f4", *arrays), want)
        return counts["recorded"], counts["played"]

    assert counted() == (0, 0)
    recorded, played = counted()
    assert recorded > 0 == played
    if workers == 2:  # what one of them does while the other one records is recorded by a later call
        found = counted()
        while found[0]:
            assert found[1] >= recorded
            recorded += found[0]
            found = counted()
    for _ in range(3):
        assert counted() == (0, recorded)


def test_a_bias_is_recorded_by_itself(counts):
    rng = np.random.default_rng(2)
    for i in range(8):
        x, w = drawn(rng, (1, 8, 5, 6, 7)), drawn(rng, (8, 8, 3, 3, 3))
        bias = drawn(rng, 8) if i % 2 else None
        wide = [None if array is None else array.astype("f8") for array in (x, w, bias)]
        want = torch.conv_transpose3d(*wide, stride=2).astype("f4")
        assert same_bits(torch.conv_transpose3d(x, w, bias, stride=2), want)
    assert counts["recorded"] > 0
    assert counts["played"] > 0


def test_what_is_played_sees_values_that_are_not_finite():
    rng = np.random.default_rng(3)
    plan = partial(gemmconv.conv3d_transpose, strides=1, padding="SAME", algorithm="winograd")
    for i in range(6):
        x, w = drawn(rng, (1, 9, 9, 9, 32)), drawn(rng, (3, 3, 3, 32, 32))
        if i > 3:
            x[0, 4, 4, 4, 5] = (np.inf, np.nan)[i % 2]
        want = oracle.conv3d_transpose(x, w, (1, 9, 9, 9, 32), (1, 1, 1), "SAME", "NDHWC", (1, 1, 1))
        assert same_bits(plan(x, w), want.astype("f4"))


def test_two_blocks_that_are_alike_share_a_tape():
    rng = np.random.default_rng(4)
    schedule = Schedule(adds)
    tapes, workspaces = tape.Tapes(schedule), [Workspace(256, F4), Workspace(256, F4)]
    for i in range(6):
        for block in (0, 1):
            operands = operands_of(rng, drawn(rng, 1) if i > 2 else None)
            tapes.run(block, operands, workspaces[(block + i) % 2])
            mine = slice(4 * block, 4 * block + 4)
            want = np.full(8, 99, F4)
            want[mine] = (operands.value + operands.filter)[mine][::-1]
            want[mine] += 0 if operands.bias is None else operands.bias
            assert same_bits(operands.output, want)
    assert schedule.runs == 8
    with_bias, without = (
        len({id(r.tape) for k, r in tapes._recordings.items() if (k < 0) == b}) for b in (True, False)
    )
    assert with_bias == without == 1


def test_a_slot_has_the_same_workspace_from_call_to_call(monkeypatch):
    """After calls of one worker, and of another dtype, too; one that is too small is replaced."""
    monkeypatch.setattr(running, "usable_cores", lambda: 2)
    first = running._acquire(2, 4096, F4)
    running._release(first)
    for number, dtype in ((2, F4), (1, F4), (2, F4), (1, np.dtype("f8")), (2, F4)):
        found = running._acquire(number, 100, dtype)
        assert dtype != F4 or found == first[2 - number :]
        running._release(found)
    larger = running._acquire(2, 8192, F4)
    assert not {*map(id, larger)} & {*map(id, first)}
    assert all(workspace.size >= 8192 for workspace in larger)


def test_each_worker_has_what_is_made_for_itself():
    rng = np.random.default_rng(5)
    tapes, workspaces = tape.Tapes(Schedule(adds)), [Workspace(256, F4), Workspace(256, F4)]
    for _ in range(3):
        for workspace in workspaces:
            tapes.run(0, operands_of(rng), workspace)
    first, second = (next(iter(workspace.bound.values())).made for workspace in workspaces)
    assert not np.shares_memory(first, second)


def test_what_blocks_make_takes_memory_once():
    """However many plans a workspace has served."""

    def makes(values, mine, operands, workspace):
        twice, made = np.empty(values, F4), np.empty(4, F4)
        np.copyto(twice[:4], operands.value[mine])
        np.add(twice[:4], operands.filter[mine], out=made)
        np.add(twice[:4], made, out=operands.output[mine])

    rng = np.random.default_rng(9)
    workspace, sizes = Workspace(256, F4), [50, 100, 30, 1000, 4, 999, 600]
    for values in sizes:
        tapes = tape.Tapes(Schedule(partial(makes, values)))
        for _ in range(4):
            operands = operands_of(rng)
            tapes.run(0, operands, workspace)
            assert same_bits(operands.output[:4], 2 * operands.value[:4] + operands.filter[:4])
    assert len(workspace.bound) == len(sizes)
    memories = {id(bound.made.base): bound.made.base for bound in workspace.bound.values()}
    assert sum(memory.nbytes for memory in memories.values()) < 2 * 4 * max(sizes) + 2048


def test_phases_of_what_is_played():
    rng = np.random.default_rng(6)
    tapes, workspace = tape.Tapes(Schedule(adds)), Workspace(256, F4)
    for _ in range(3):
        workspace.clock = Clock()
        tapes.run(0, operands_of(rng), workspace)
        assert list(workspace.clock.seconds) == ["gemm", "store"]


def test_operands_that_lie_elsewise_are_not_played(counts):
    rng = np.random.default_rng(7)
    tapes, workspace = tape.Tapes(Schedule(adds)), Workspace(256, F4)
    for i in range(6):
        operands = operands_of(rng)
        if i > 3:
            value = np.repeat(operands.value, 2)[::2]
            assert value.strides != operands.value.strides
            operands = operands._replace(value=value)
        tapes.run(0, operands, workspace)
        assert same_bits(operands.output[:4], (operands.value + operands.filter)[3::-1])
        assert counts["played"] == min(2, max(0, i - 1))


def test_what_is_held_is_filled_once_a_call():
    rng = np.random.default_rng(8)
    filled = []

    @recorder.step
    def fill(to, source):
        filled.append(1)
        np.copyto(to, source)

    def run(mine, operands, workspace):
        rows = workspace.take(4)
        workspace.hold("rows", "first half", lambda: fill(rows, operands.value[:4]))
        np.add(rows, operands.filter[mine], out=operands.output[mine])

    tapes, workspace = tape.Tapes(Schedule(run)), Workspace(256, F4)
    for i in range(5):
        filled.clear()
        operands = operands_of(rng)
        for block in (0, 1):
            tapes.run(block, operands, workspace)
        assert same_bits(operands.output, np.tile(operands.value[:4], 2) + operands.filter)
        assert len(filled) == (2 if i == 1 else 1)  # recording fills always
        workspace.release()


def test_of_too_many_steps_a_schedule_is_run_as_it_is(counts, monkeypatch):
    monkeypatch.setattr(tape, "MOST_STEPS", 4)
    rng = np.random.default_rng(9)

    def run(mine, operands, workspace):
        for i in range(mine.start, mine.stop):
            which = slice(i, i + 1)
            (np.multiply if mine.start else np.hypot)(
                operands.value[which], operands.filter[which], out=operands.output[which]
            )

    schedule = Schedule(run)
    tapes, workspace = tape.Tapes(schedule), Workspace(256, F4)
    for _ in range(4):
        for block in (0, 1):
            tapes.run(block, operands_of(rng), workspace)
    assert counts == {"recorded": 1, "played": 2}
    assert schedule.runs == 6


def test_one_worker_records_at_a_time(counts):
    """Two would wait for each other in Python's lock; the other one runs its block as it is written."""
    rng = np.random.default_rng(19)
    mine, others = Workspace(256, F4), Workspace(256, F4)

    def meets(of, operands, workspace):
        if isinstance(workspace, recorder.Recorder) and of.start == 0:
            tapes.run(1, operands_of(rng), others)
            assert counts["recorded"] == 0
        adds(of, operands, workspace)

    tapes = tape.Tapes(Schedule(meets))
    for block in (0, 1, 0):
        tapes.run(block, operands_of(rng), mine)
    assert counts["recorded"] == 1
    tapes.run(1, operands_of(rng), others)
    assert counts == {"recorded": 2, "played": 0}


def test_a_call_records_some_blocks_and_later_ones_the_others(counts, monkeypatch):
    monkeypatch.setattr(tape, "STEPS_A_CALL", 5)
    rng = np.random.default_rng(17)
    tapes, workspace = tape.Tapes(Schedule(adds)), Workspace(256, F4)
    for i in range(4):
        tapes.begin()
        for block in (0, 1):
            operands = operands_of(rng)
            tapes.run(block, operands, workspace)
            mine = slice(4 * block, 4 * block + 4)
            assert same_bits(operands.output[mine], (operands.value + operands.filter)[mine][::-1])
        # Each block has three steps.
        assert counts["recorded"] == (0, 2, 2, 2)[i]
    monkeypatch.setattr(tape, "STEPS_A_CALL", 3)
    tapes, workspace = tape.Tapes(Schedule(adds)), Workspace(256, F4)
    for i in range(4):
        tapes.begin()
        for block in (0, 1):
            tapes.run(block, operands_of(rng), workspace)
        assert counts["recorded"] == (2, 3, 4, 4)[i]
    monkeypatch.setattr(tape, "_FLOPS_A_STEP", 10)
    tapes, workspace = tape.Tapes(Schedule(adds)), Workspace(256, F4)
    for i in range(3):
        tapes.begin(60)  # six steps
        for block in (0, 1):
            tapes.run(block, operands_of(rng), workspace)
        assert counts["recorded"] == (4, 6, 6)[i]


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: np.add(x, x),
        lambda x, w: x + 1,
        lambda x, w: np.concatenate([x, x]),
        lambda x, w: np.empty_like(x),
        lambda x, w: np.copyto(x[:4], x[4:], where=np.ones(4, bool)),
        lambda x, w: np.copyto(x[:4], np.array(x[4:])),
        lambda x, w: np.add(x, x, out=x, where=np.ones(8, bool)),
        lambda x, w: np.add(x, x[0], out=x),
        lambda x, w: x.fill(1),
        lambda x, w: bool(x[:1]),
        lambda x, w: np.add(x, x.astype("f4"), out=x),
        lambda x, w: np.copyto(w.take(2, 2), x.reshape(2, 4).T.reshape(8)[:4].reshape(2, 2)),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(use):
    """A new array would be of the values that were there when it was recorded."""
    workspace = Workspace(256, F4)
    made = recorder.Recorder(workspace, operands_of(np.random.default_rng(10)), most=100)
    with pytest.raises(recorder.CannotRecordError, match="recorded"):
        use(made.operands.value, made)


def test_what_nobody_can_write_is_a_constant():
    """A matrix of a schedule's own, that is the same in every call; an operand that nobody can write is none."""
    rng = np.random.default_rng(18)
    matrix = np.array([[1, -1], [2, 3]], F4)
    matrix.flags.writeable = False

    def run(mine, operands, workspace):
        np.matmul(matrix, operands.value[mine].reshape(2, 2), out=operands.output[mine].reshape(2, 2))

    tapes, workspace = tape.Tapes(Schedule(run)), Workspace(256, F4)
    for _ in range(4):
        operands = operands_of(rng)
        operands.value.flags.writeable = False
        tapes.run(0, operands, workspace)
        assert same_bits(operands.output[:4], (matrix @ operands.value[:4].reshape(2, 2)).reshape(4))
    assert tapes._recordings[0] is not None


@pytest.mark.parametrize(
    ("function", "shapes", "want"),
    [
        (np.add, [(2, 3, 4)] * 3, [(24,)] * 3),
        (np.copyto, [(2, 1, 4)] * 2, [(8,)] * 2),
        (np.subtract, [(2, 3, 4), (2, 3, 4), (2, 3, 5)], [(6, 4)] * 3),
        (np.multiply, [(2, 3, 4), (1, 1, 1), (2, 3, 4)], [(24,), (1,), (24,)]),
        (np.add, [(2, 4), (4,), (2, 4)], [(2, 4), (4,), (2, 4)]),
        (np.matmul, [(2, 3, 1, 4, 5), (2, 3, 1, 5, 4), (2, 3, 1, 4, 4)], [(6, 4, 5), (6, 5, 4), (6, 4, 4)]),
        (np.matmul, [(2, 3, 4, 5), (2, 1, 5, 4), (2, 3, 4, 4)], [(2, 3, 4, 5), (2, 1, 5, 4), (2, 3, 4, 4)]),
        (np.hypot, [(2, 3)] * 3, [(2, 3)] * 3),
    ],
)
def test_arrays_get_as_few_axes_as_possible(function, shapes, want):
    """Those along which all go on evenly are one; the last two of a product stay, and so does what is spread."""
    places = []
    for number, shape in enumerate(shapes):
        # One of the arrays may be a part of a larger one.
        whole = np.empty(shape, F4)
        shape = min(shape, shapes[0]) if len(shape) == len(shapes[0]) and function is np.subtract else shape
        places.append(steps.Place(number, 0, shape, F4, whole.strides))
    found = steps._coalesced(steps.Step(function, places))
    assert [place.shape for place in found.arguments] == want
    for before, after in zip(places, found.arguments, strict=True):
        memory = np.arange(1000, dtype=F4)
        a, b = (np.ndarray(p.shape, p.dtype, memory, p.offset, p.strides) for p in (before, after))
        assert np.array_equal(a.reshape(-1), b.reshape(-1))


@pytest.mark.parametrize(
    ("dtype", "shape", "strides", "want"),
    [
        ("f4", (1 << 13,), (4,), (1, 1 << 13)),
        ("f4", (1 << 20,), (4,), (16, 1 << 16)),
        ("f4", (3, 7, 1 << 14), (7 << 16, 1 << 16, 4), (6, 57_344)),
        ("f8", (2, 9, 5000), (500_000, 40_000, 8), (2, 2, 22_500)),
        ("c8", (2, 40_000), (400_000, 8), (2, 2, 20_000)),
        # Too short, not beside each other, and in no equal rows.
        ("f4", ((1 << 13) - 1,), (4,), None),
        ("f4", (1 << 14,), (8,), None),
        ("f4", (1 << 14,), (-4,), None),
        ("f4", (65_537,), (4,), None),
    ],
)
def test_long_runs_of_zeros_are_copied(dtype, shape, strides, want):
    """By rows that are equal, of memory that stays in cache; what lies between and behind them is left alone."""
    dtype, behind = np.dtype(dtype), 1 << 16
    at = behind + max(0, -strides[0] * (shape[0] - 1))
    place = steps.Place(0, at, shape, dtype, strides)
    found = steps._coalesced(steps.Step(np.copyto, [place, 0, "unsafe"]))
    if want is None:
        assert found.arguments[1:] == [0, "unsafe"]
    else:
        assert found.arguments[0].shape == want
        assert not found.arguments[1].flags.writeable
    memory = np.ones(at + 2 * behind + sum(abs(a) * n for a, n in zip(strides, shape, strict=True)), np.uint8)
    expected = memory.copy()
    np.ndarray(shape, dtype, expected, at, strides)[...] = 0
    first = found.arguments[0]
    found.function(np.ndarray(first.shape, first.dtype, memory, first.offset, first.strides), *found.arguments[1:])
    assert np.array_equal(memory, expected)


def test_plans_copy_zeros_to_gaps(counts):
    """Of kernel 1 at stride 2 seven of eight results are gaps, of which a block clears 32 KiB and more."""
    rng = np.random.default_rng(15)
    plan = gemmconv.plan_conv3d_transpose((1, 8, 16, 16, 16), (1, 1, 1, 16, 16), strides=2)
    filter = drawn(rng, (1, 1, 1, 16, 16))
    for _ in range(6):
        value = drawn(rng, (1, 8, 16, 16, 16))
        want = np.zeros(plan.output_shape, F4)
        want[:, ::2, ::2, ::2] = value @ filter[0, 0, 0].T
        assert same_bits(plan(value, filter), want)
    assert counts["played"] > 0
    tapes = [found.tape for found in plan._needs.tapes._recordings.values() if found is not None]
    assert any(step.arguments[1].base is steps._ZEROS
               for of in tapes for step in of.steps
               if step.function is np.copyto and isinstance(step.arguments[1], np.ndarray))  # fmt: skip


@pytest.mark.parametrize("value", [1, -1, 0.0, -0.0, True, False])
def test_other_values_are_set(value):
    """What is no plain 0 is no row of zeros."""
    one = steps.Step(np.copyto, [steps.Place(0, 0, (1 << 20,), F4, (4,)), value, "unsafe"])
    assert steps._coalesced(one) == one


def test_operands_that_share_memory_are_not_recorded(counts):
    """From an address alone it would not follow which of them is read."""
    rng = np.random.default_rng(14)
    gemmconv.clear_cache()
    for i in range(6):
        x, y = drawn(rng, (2, 8, 8, 8, 16)), drawn(rng, (2, 8, 8, 8, 16))
        y = x if i < 3 else y
        found = gemmconv.conv3d_backprop_filter_v2(x, (3, 3, 3, 16, 16), y, [1] * 5, "SAME")
        wide = gemmconv.conv3d_backprop_filter_v2(x.astype("f8"), (3, 3, 3, 16, 16), y.astype("f8"), [1] * 5, "SAME")
        assert same_bits(found, wide.astype("f4"))
        assert (counts["recorded"] > 0) == (i > 0)  # the operands of float64 are copies, which lie apart


def test_what_is_left_to_another_lowering_is_not_recorded(counts):
    rng = np.random.default_rng(15)
    x, w = drawn(rng, (1, 8, 5, 6, 7)), drawn(rng, (8, 4, 3, 3, 3))
    x[0, 3, 2, 2, 2] = w[1, 1, 1, 1, 1] = np.nan
    for _ in range(4):
        torch.conv3d(x, w, padding=1, groups=2)
    assert counts["recorded"] <= 4


def test_operands_are_let_go_of_at_once():
    rng = np.random.default_rng(16)
    # As the plan is made, errors of lowerings that cannot do the problem refer to what called them.
    gemmconv.conv3d_transpose(drawn(rng, (1, 8, 8, 8, 16)), drawn(rng, (3, 3, 3, 16, 16)), strides=2)
    gc.disable()
    try:
        for _ in range(4):
            x, w = drawn(rng, (1, 8, 8, 8, 16)), drawn(rng, (3, 3, 3, 16, 16))
            y = gemmconv.conv3d_transpose(x, w, strides=2)
            alive = [weakref.ref(array) for array in (x, w, y)]
            del x, w, y
            end = time.monotonic() + 5  # a pool thread may be about to leave the call
            while any(ref() is not None for ref in alive):
                assert time.monotonic() < end
                time.sleep(0.001)
    finally:
        gc.enable()


def test_a_block_of_too_many_steps_is_not_kept(counts, monkeypatch):
    monkeypatch.setattr(tape, "MOST_STEPS", 4)
    rng = np.random.default_rng(17)

    def run(mine, operands, workspace):
        rows = workspace.take(4)
        for i in range(3):
            key = i
            workspace.hold("rows", key, lambda: np.copyto(rows, operands.value[mine]))
            np.add(rows, operands.filter[mine], out=operands.output[mine])

    schedule = run_four_times(rng, run)
    assert counts == {"recorded": 0, "played": 0}
    assert schedule.runs == 4


def test_what_cannot_be_recorded_is_run_as_it_is(counts):
    rng = np.random.default_rng(13)

    def run(mine, operands, workspace):
        operands.output[mine] = operands.value[mine] + operands.filter[mine]

    schedule = run_four_times(rng, run)
    assert schedule.runs == 5
    assert counts == {"recorded": 0, "played": 0}


def test_calls_that_are_recorded():
    """Additions in place, reductions, casts, indices that are arrays, views with other strides, functions as steps."""
    rng = np.random.default_rng(11)

    def run(mine, operands, workspace):
        values = workspace.take(2, 2)
        values[...] = operands.value[mine].reshape(2, 2).T
        values += 1
        total = np.empty((), F4)
        np.add.reduce(values, axis=None, out=total)
        np.add.reduce(values, axis=1, out=operands.output[mine][:2])
        last = operands.output[mine][2:]
        last[np.array([1, 0])] = operands.value[mine][:1:-1]
        last[np.array([1, 0])] = as_strided(values, (2,), (12,), subok=True)
        np.multiply(last, total, out=last)
        np.copyto(operands.output.view(np.int32)[mine][:1], operands.filter[mine][:1], casting="unsafe")
        need_finite(last)

    tapes, workspace = tape.Tapes(Schedule(run)), Workspace(256, F4)
    for _ in range(5):
        operands = operands_of(rng)
        tapes.run(1, operands, workspace)
        values = operands.value[4:].reshape(2, 2).T + 1
        want = np.array([0, values[1].sum(), values[1, 1], values[0, 0]], F4)
        want[2:] *= values.sum()
        want[:1].view(np.int32)[...] = operands.filter[4]
        assert same_bits(operands.output[4:], want)
        assert (operands.output[:4] == 99).all()
    operands.value[5] = np.nan
    with pytest.raises(NotFiniteError):
        tapes.run(1, operands, workspace)


@pytest.mark.parametrize(
    ("calls", "steps"),
    [
        # Along one axis and along two, in any order of what follows.
        ([(0, 0), (1, 1), (2, 2), (3, 3)], 1),
        ([(3, 1), (2, 2), (1, 3)], 1),
        ([(0, 0), (1, 1), (4, 5), (5, 6)], 1),
        ([(0, 0), (1, 1), (2, 2), (5, 5), (6, 6), (7, 7)], 1),
        # Not evenly apart, and one that is read twice.
        ([(0, 0), (1, 1), (3, 3)], 2),
        ([(0, 3), (1, 3), (2, 3)], 1),
        # Written twice, and written before or after it is read.
        ([(0, 0), (0, 1), (0, 2)], 3),
        ([(1, 0), (2, 1), (3, 2)], 3),
        ([(0, 1), (1, 2), (2, 3)], 3),
    ],
)
@pytest.mark.parametrize("adds", [False, True])
def test_calls_that_are_joined(calls, steps, adds):
    """Calls write rows of 16 values of the workspace, from rows of it where they are to meet, else of the value."""
    rng = np.random.default_rng(12)
    meet = steps == len(calls)

    def run(mine, operands, workspace):
        rows = workspace.take(8, 16)
        rows[...] = operands.value.reshape(8, 16)
        source = rows if meet else operands.value.reshape(8, 16)
        workspace.mark("pack")
        for to, at in calls:
            if adds:
                np.add(rows[to], source[at], out=rows[to])
            else:
                rows[to] = source[at]
        workspace.mark("gemm")
        operands.output[...] = rows.reshape(-1)

    tapes, workspace = tape.Tapes(Schedule(run)), Workspace(1024, F4)
    for _ in range(4):
        value = drawn(rng, 128)
        operands = Operands(value, np.empty(0, F4), np.empty(128, F4), np.empty(0, F4), STEPS)
        tapes.run(0, operands, workspace)
        want = value.reshape(8, 16).copy()
        source = want if meet else value.reshape(8, 16)
        for to, at in calls:
            want[to] = source[at] + (want[to] if adds else 0)
        assert same_bits(operands.output, want.reshape(-1))
    (_, _), (end, _) = (found := tapes._recordings[0].tape).marks
    assert end - found.marks[0][0] == steps
