"""Results box by box: from and to maps, files and Zarr arrays, in bounded memory, interrupted and gone on with."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from oracle import same_bits

import gemmconv
from gemmconv import cli, compute_stored, plan_conv3d_transpose, stored
from gemmconv.journal import resumable
from gemmconv.machine import Machine
from gemmconv.plan import make_plan
from gemmconv.problem import Axis, Problem

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:zarr")
SMALL = Machine(2, 1 << 16, 1 << 20)


def problem(operation="conv3d_transpose", layout="NDHWC", dtype=np.float32):
    axes = Axis(9, 20, 4, 2, 1, 1), Axis(8, 8, 3, 1, 1, 1), Axis(7, 15, 3, 2, 1, 0)
    return Problem(operation, 2, 6, 5, axes, np.dtype(dtype), layout)


def operands_of(asked, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(asked.dtype) for shape in asked.operand_shapes]


class Chunked:
    """An array as a library of chunked storage has it, which counts how often each chunk is written."""

    def __init__(self, array, chunks):
        self.array, self.chunks, self.written = array, chunks, {}
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, box):
        return self.array[box]

    def __setitem__(self, box, values):
        self.array[box] = values
        spans = [
            range(span.start // chunk, -(-span.stop // chunk)) for span, chunk in zip(box, self.chunks, strict=True)
        ]
        for place in np.ndindex(*map(len, spans)):
            chunk = tuple(span[i] for span, i in zip(spans, place, strict=True))
            self.written[chunk] = self.written.get(chunk, 0) + 1


@pytest.mark.parametrize("layout", ["NDHWC", "NCDHW"])
@pytest.mark.parametrize("operation", ["conv3d_transpose", "conv3d", "conv3d_backprop_filter"])
def test_boxes_on_the_cuts_have_the_bits_of_the_whole(operation, layout):
    asked = dataclasses.replace(problem(operation, layout), batch=8)
    plan = make_plan(asked, Machine(2, 1 << 14, 1 << 20), "auto", 2)
    a, b = operands_of(asked)
    out = np.full(plan.output_shape, np.nan, np.float32)
    for step in (1, 2, 1000):
        borders = [sorted({*cuts[::step], 0, cuts[-1]}) for cuts in plan.cuts]
        chunks = [[b - a for a, b in itertools.pairwise(of_axis)] for of_axis in borders]
        out[...] = np.nan
        assert compute_stored(plan, a, b, out, chunks=chunks) is out
        assert out.tobytes() == plan(a, b).tobytes()
    assert plan.blocks > 1


def test_less_memory_than_a_block_takes_boxes_off_the_cuts():
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    memory = plan.workspace_bytes + b.nbytes + 20_000  # of 60_000 that the smallest blocks take
    chunks = stored.boxes_for(plan, memory, (a.dtype, b.dtype))
    assert len(list(plan.boxes(chunks))) > math.prod(len(cuts) - 1 for cuts in plan.cuts)
    out = compute_stored(plan, a, b, np.empty(plan.output_shape, np.float32), memory=memory)
    assert np.allclose(out, plan(a, b), atol=1e-4)
    with pytest.raises(ValueError, match=rf"memory={plan.workspace_bytes} bytes are not enough: .* take \d+"):
        compute_stored(plan, a, b, out, memory=plan.workspace_bytes)
    with pytest.raises(ValueError, match=r"the smallest boxes of the result .* take \d+ bytes .*, more than 10$"):
        plan.chunks(10)


def test_parts_are_seen_by_profile():
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    part = plan.part([(0, cuts[1]) for cuts in plan.cuts])
    windows = a[part.windows[0]], b
    with gemmconv.profile() as p:
        part(*windows)
        part(*windows)
    assert part.on_blocks
    assert p.calls == 2
    assert p.seconds["gemm"] > 0
    assert sum(p.seconds.values()) <= p.worker_seconds * 1.01


def test_done_boxes_are_skipped_and_finished_ones_told():
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    chunks = [[2], [7, 7, 6], [8], [8, 7], [5]]
    boxes = list(plan.boxes(chunks))
    out = np.full(plan.output_shape, 7, np.float32)
    told, steps = [], []
    compute_stored(
        plan, a, b, out, chunks=chunks, done={0, 2}, finished=told.append, progress=lambda *step: steps.append(step)
    )
    assert told == [i for i in range(len(boxes)) if i not in (0, 2)]
    assert (out[boxes[0]] == 7).all()
    assert (out[boxes[2]] == 7).all()
    assert np.allclose(out[boxes[1]], plan(a, b)[boxes[1]], atol=1e-4)
    assert steps[-1] == (1000 * len(boxes), 1000 * len(boxes))


def test_no_two_boxes_share_a_stored_chunk():
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    out = Chunked(np.empty(plan.output_shape, np.float32), (1, 6, 4, 15, 5))
    compute_stored(plan, a, b, out, memory=plan.workspace_bytes + b.nbytes + 40_000)
    assert np.allclose(out.array, plan(a, b), atol=1e-4)
    assert set(out.written.values()) == {1}
    assert len(out.written) == 2 * 4 * 2
    with pytest.raises(
        ValueError, match=r"two boxes would share a chunk of out: they meet at 10 on axis 1, .* of 6 begin"
    ):
        compute_stored(plan, a, b, out, chunks=[[2], [10, 10], [8], [15], [5]])
    with pytest.raises(ValueError, match=r"chunks add up to \(2, 19, 8, 15, 5\), but the result has shape"):
        compute_stored(plan, a, b, out, chunks=[[2], [10, 9], [8], [15], [5]])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"value": np.zeros((1, 9, 8, 7, 6), np.float32)},
            r"value has shape \(1, 9, 8, 7, 6\), but the plan was made for",
        ),
        ({"value": np.zeros((2, 9, 8, 7, 6))}, "give float64, but the plan was made for float32"),
        ({"out": np.zeros((2, 20, 8, 15, 4), np.float32)}, r"out has shape \(2, 20, 8, 15, 4\), but the result has"),
        ({"out": np.zeros((2, 20, 8, 15, 5), np.float16)}, "out has dtype float16, to which"),
        ({"value": [[1.0]]}, r"value has shape \(1, 1\)"),
    ],
)
def test_refusals(change, text):
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    given = {"value": a, "filter": b, "out": np.full(plan.output_shape, 3, np.float32)} | change
    before = given["out"].copy()
    with pytest.raises((ValueError, TypeError), match=f"compute_stored: .*{text}|compute_stored: {text}"):
        compute_stored(plan, given["value"], given["filter"], given["out"])
    assert (given["out"] == before).all()


def test_masks_are_not_lost():
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    out = np.full(plan.output_shape, 3, np.float32)
    for x, w in ((np.ma.array(a, mask=True), b), (a, np.ma.array(b, mask=True))):
        with pytest.raises(TypeError, match=r"^compute_stored: .* is a masked array, whose mask would be lost"):
            compute_stored(plan, x, w, out)
    assert (out == 3).all()


def test_lists_are_taken_as_a_plan_takes_them():
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    a, b = operands_of(asked)
    out = np.empty(plan.output_shape, np.float32)
    assert compute_stored(plan, a.tolist(), b.tolist(), out).tobytes() == plan(a, b).tobytes()


def test_out_must_not_be_an_operand():
    """Later boxes read what earlier ones would have written."""
    plan = plan_conv3d_transpose((1, 8, 4, 4, 2), (3, 3, 3, 2, 2))
    both, filter = np.ones((1, 8, 4, 4, 2), np.float32), np.ones((3, 3, 3, 2, 2), np.float32)
    with pytest.raises(ValueError, match=r"^compute_stored: out shares memory with value"):
        compute_stored(plan, both, filter, both)
    assert (both == 1).all()


@pytest.mark.parametrize("memory", ["2G", None, 1.5])
def test_memory_is_a_number_of_bytes(memory):
    asked = problem()
    plan = make_plan(asked, SMALL, "auto", 1)
    out = np.full(plan.output_shape, 3, np.float32)
    with pytest.raises(TypeError, match=r"memory, in bytes, must be an integer, got"):
        compute_stored(plan, *operands_of(asked), out, memory=memory)
    with pytest.raises(TypeError, match=r"most_bytes must be an integer, got"):
        plan.chunks(memory)
    assert (out == 3).all()


@pytest.mark.parametrize(
    ("chunks", "error", "text"),
    [
        (16, ValueError, "must be 5 sequences of lengths, one for each axis, got 16"),
        ([[2], [20]], ValueError, "must be 5 sequences"),
        ([2, [20], [8], [15], [5]], TypeError, r"chunks\[0\] must be"),
    ],
)
def test_chunks_that_are_none(chunks, error, text):
    with pytest.raises(error, match=text):
        make_plan(problem(), SMALL, "auto", 1).boxes(chunks)


# The command.


@pytest.fixture
def files(tmp_path, monkeypatch, request):
    """VALUE.npy and FILTER.npy in an empty folder, and the result; whole numbers where chunks may cut blocks."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    value, filter = (rng.standard_normal(shape, np.float32) for shape in ((1, 80, 64, 64, 16), (4, 4, 4, 8, 16)))
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("target") == "o.zarr":
        value, filter = np.rint(8 * value), np.rint(8 * filter)
    np.save("v.npy", value)
    np.save("w.npy", filter)
    return gemmconv.conv3d_transpose(value, filter, strides=2)


RUN = ["run", "v.npy", "w.npy", "--strides", "2", "--memory", "48M"]


@pytest.mark.parametrize("source", ["v.npy", "v.zarr"])
@pytest.mark.parametrize("target", ["o.npy", "o.zarr"])
def test_run_in_boxes(files, source, target):
    """The whole's bits, the final name, and nothing else beside it."""
    zarr.create_array("v.zarr", data=np.load("v.npy"), chunks=(1, 16, 16, 32, 16))
    assert cli.main(["run", source, *RUN[2:], "--output", target]) == 0
    out = zarr.open_array(target, mode="r") if target == "o.zarr" else np.load(target)
    assert same_bits(out[...], files)
    assert sorted(os.listdir()) == sorted(["v.npy", "v.zarr", "w.npy", target])
    assert cli.main(["run", source, *RUN[2:], "--output", target]) == 2  # it exists
    assert cli.main(["run", source, *RUN[2:], "--output", target, "--force"]) == 0


def test_stored_chunks_that_are_asked_for(files, capsys):
    assert cli.main([*RUN, "--output", "o.zarr", "--chunks", "1,32,32,128,8"]) == 0
    out = zarr.open_array("o.zarr", mode="r")
    assert out.chunks == (1, 32, 32, 128, 8)
    assert np.allclose(out[...], files, atol=1e-3)
    for chunks, text in (
        ("1,160,128,128,8", "smallest boxes"),
        ("1,2", "must be 5 positive"),
        ("1,0,1,1,1", "must be 5"),
    ):
        assert cli.main([*RUN, "--output", "p.zarr", "--chunks", chunks]) == 2
        assert text in capsys.readouterr().err
    assert cli.main([*RUN, "--output", "p.npy", "--memory", "1G", "--chunks", "1,160,128,128,8"]) == 2
    assert "is for a Zarr array" in capsys.readouterr().err
    assert not os.path.exists("p.zarr")


@pytest.mark.parametrize("target", ["o.npy", "o.zarr"])
def test_an_interrupted_run_goes_on(files, target, monkeypatch, capsys):
    """Boxes that are done are not computed again; another result under the same name is refused."""
    command = [*RUN, "--output", target]
    called = []
    real = gemmconv.part.Part.__call__

    def counted(self, *args, **more):
        called.append(self.bounds)
        if len(called) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    monkeypatch.setattr("gemmconv.part.Part.__call__", counted)
    assert cli.main(command) == 130
    assert f"{target}.part holds what is done; the same command goes on" in capsys.readouterr().err
    assert sorted(os.listdir()) == sorted(["v.npy", "w.npy", f"{target}.part", f"{target}.part.log"])
    with open(f"{target}.part.log", "a") as log:
        log.write("box 1")  # as if the machine had stopped while it wrote 'box 11 done'
    assert cli.main([*command, "--dilations", "2"]) == 2
    assert "interrupted result with another problem" in capsys.readouterr().err
    assert cli.main([*command[:-4], "--memory", "56M", "--output", target]) == 0  # boxes stay as they were
    assert "going on: 3 boxes" in capsys.readouterr().err
    assert len(called) == len(set(called)) + 1
    out = zarr.open_array(target, mode="r") if target == "o.zarr" else np.load(target)
    assert same_bits(out[...], files)
    assert sorted(os.listdir()) == sorted(["v.npy", "w.npy", target])


def test_force_begins_anew(files, capsys):
    what = {"problem": "another"}
    with (
        pytest.raises(RuntimeError),
        resumable(Path("o.npy"), what, [[1]], lambda path: path.write_bytes(b"x")),
    ):
        raise RuntimeError
    assert json.loads(Path("o.npy.part.log").read_text().splitlines()[0])["what"] == what
    assert cli.main([*RUN, "--output", "o.npy"]) == 2
    assert "o.npy.part is an interrupted result with another value, filter, problem" in capsys.readouterr().err
    assert cli.main([*RUN, "--output", "o.npy", "--force"]) == 0
    assert np.load("o.npy").tobytes() == files.tobytes()


def test_one_process_at_a_time(files, capsys):
    pytest.importorskip("fcntl")
    with resumable(Path("o.npy"), {}, [[1]], lambda path: path.write_bytes(b"x")):
        assert cli.main([*RUN, "--output", "o.npy", "--force"]) == 2
        assert "another process is writing o.npy.part" in capsys.readouterr().err
    assert Path("o.npy").read_bytes() == b"x"


def test_a_killed_process_has_lost_a_box_at_most(files):
    """SIGKILL, which nothing can be done against."""
    np.save("v.npy", np.tile(np.load("v.npy"), (2, 1, 1, 1, 1)))
    command = [sys.executable, "-m", "gemmconv", *RUN, "--output", "o.npy"]
    process, log = subprocess.Popen(command), Path("o.npy.part.log")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("done") > 1:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    found = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    assert "going on: " in found.stderr
    assert np.load("o.npy").tobytes() == np.tile(files, (2, 1, 1, 1, 1)).tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts maps on Linux only")
def test_four_gibibytes_with_one_of_memory(tmp_path):
    """The up-sampling of 512 x 512 x 512 voxels by two, in a process that may have 1 GiB for data."""
    shape = (1, 512, 512, 512, 1)
    value = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float32, shape)
    planes = np.arange(512 * 512, dtype=np.float32).reshape(512, 512, 1) % 251
    for i in range(512):
        value[0, i] = planes + i % 7
    del value
    np.save(tmp_path / "w.npy", np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2, 1, 1))
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30)); "
        "from gemmconv import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = ["run", "v.npy", "w.npy", "--strides", "2", "--output", "o.npy"]
    subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, check=True)
    out = np.load(tmp_path / "o.npy", mmap_mode="r")
    assert out.nbytes == 4 << 30
    for i in (0, 1, 510, 511, 512, 1023):
        plane = np.repeat(np.repeat(planes + i // 2 % 7, 2, 0), 2, 1)
        taps = np.tile(np.arange(1, 5, dtype=np.float32).reshape(2, 2, 1) + 4 * (i % 2), (512, 512, 1))
        assert np.array_equal(out[0, i], plane * taps)


def test_extra_is_named_where_it_lacks(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert cli.main([*RUN, "--output", "o.zarr"]) == 2
    assert "zarr" in capsys.readouterr().err
    assert cli.main(["run", "v.zarr", *RUN[2:], "--output", "o.npy"]) == 2
    assert "pip install zarr" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("100", 100), ("3k", 3072), ("1.5M", 3 << 19), ("2G", 2 << 30)])
def test_memory_in_words(text, size):
    assert cli._memory(text) == size


@pytest.mark.parametrize("text", ["", "M", "ten", "1e999G"])
def test_memory_that_is_no_number(text, capsys):
    with pytest.raises(SystemExit):
        cli.main([*RUN[:-1], text, "--output", "o.npy"])
    assert "is not a number of bytes" in capsys.readouterr().err
