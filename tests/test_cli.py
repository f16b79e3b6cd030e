"""Every command at toy size, every refusal with its text and status, and no half-written file after any of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest

import gemmconv
from gemmconv import cli, demo

VALUE_SHAPE, FILTER_SHAPE = (1, 3, 4, 5, 2), (3, 3, 3, 4, 2)


@pytest.fixture
def files(tmp_path):
    """A folder with a value and a filter of small integers, whose sums have the same bits in any order."""
    rng = np.random.default_rng(7)
    for name, shape in (("x.npy", VALUE_SHAPE), ("f.npy", FILTER_SHAPE)):
        np.save(tmp_path / name, rng.integers(-8, 9, shape).astype(np.float32))
    return tmp_path


def run(folder, *words, output="y.npy", value="x.npy", filter="f.npy"):
    """The status of `run` on files of the folder."""
    return cli.main(["run", str(folder / value), str(folder / filter), "--output", str(folder / output), *words])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(capsys, status, text, usage=False):
    """Check that a command was refused in one line that matches `text`."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert usage == lines[0].startswith("usage: ")
    assert usage or len(lines) == 1
    assert lines[-1].startswith("gemmconv: error: ")
    assert re.search(text, lines[-1]), lines[-1]


# --- info and plan


def test_info_prints_the_config(capsys):
    assert cli.main(["info"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("versions:\n  gemmconv ")
    assert "\nlibraries:\n" in captured.out


def test_info_json_parses(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == gemmconv.show_config(mode="dicts")


def test_plan_prints_the_plan(capsys):
    assert cli.main(["plan", "1,16,16,16,128", "4,4,4,64,128", "--strides", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{gemmconv.plan_conv3d_transpose((1, 16, 16, 16, 128), (4, 4, 4, 64, 128), strides=2)}\n"


def test_plan_passes_every_option_on(capsys):
    words = ["plan", "2,6,3,4,5", "2,3,2,4,6", "--strides", "1,1,2,2,3", "--output-shape", "2,4,9,12,16"]
    words += ["--padding", "VALID", "--data-format", "NCDHW", "--dilations", "3,2,1", "--dtype", "complex64"]
    assert cli.main([*words, "--algorithm", "col2im", "--workers", "1"]) == 0
    expected = gemmconv.plan_conv3d_transpose(
        (2, 6, 3, 4, 5),
        (2, 3, 2, 4, 6),
        (2, 4, 9, 12, 16),
        (1, 1, 2, 2, 3),
        "VALID",
        "NCDHW",
        (3, 2, 1),
        dtype=np.complex64,
        algorithm="col2im",
        workers=1,
    )
    assert capsys.readouterr().out == f"{expected}\n"


def test_plan_takes_bfloat16_by_name(capsys):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, which brings bfloat16, is not installed")
    assert cli.main(["plan", "1,2,2,2,3", "1,1,1,4,3", "--dtype", "bfloat16"]) == 0
    expected = gemmconv.plan_conv3d_transpose((1, 2, 2, 2, 3), (1, 1, 1, 4, 3), dtype=ml_dtypes.bfloat16)
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["1,2,2,2,3", "1,1,1,4,5"], r"filter has 5 input channels.* but value has 3"),
        (["2,2,2,3", "1,1,1,4,3"], r"value must be 5-D \(NDHWC\), got 4-D, shape \(2, 2, 2, 3\)"),
        (["1,2,2,2,3", "3,3,3,4,3", "--strides", "2", "--output-shape", "1,9,4,4,4"], r"\[1\]=9 is .* allow 3 to 4"),
        (
            ["1,2,2,2,3", "1,1,1,4,3", "--strides", "1,2"],
            r"strides should be of length 1, 3 or 5\. Received: .*\[1, 2\]",
        ),
        (["1,2,2,2,3", "1,1,1,4,3", "--strides", "0"], r"strides=\[0\] must be at least 1"),
        (["1,2,2,2,3", "1,1,1,4,3", "--padding", "same"], r"padding must be 'SAME' or 'VALID', got 'same'"),
        (["1,2,2,2,3", "1,1,1,4,3", "--data-format", "NHWC"], r"data_format must be 'NDHWC' or 'NCDHW', got 'NHWC'"),
        (["1,2,2,2,3", "1,1,1,4,3", "--algorithm", "magic"], r"algorithm.*'magic'"),
        (["1,2,2,2,3", "1,1,1,4,3", "--workers", "0"], r"workers.*\b0\b"),
        (["1,2,2,2,3", "1,1,1,4,3", "--dtype", "int32"], r"int32"),
        (["1,2,2,2,3", "1,1,1,4,3", "--dtype", "float12"], r"--dtype float12: data type 'float12' not understood"),
    ],
)
def test_plan_refuses(capsys, words, text):
    refused(capsys, cli.main(["plan", *words]), text)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], r"the following arguments are required: COMMAND"),
        (["fold"], r"invalid choice: 'fold'"),
        (["plan", "1,2,2,2,3"], r"the following arguments are required: FILTER"),
        (["plan", "1,2,x,2,3", "1,1,1,4,3"], r"argument VALUE: '1,2,x,2,3' is not integers with commas between them"),
        (["plan", "1,2,2,2,3", "1,1,1,4,3", "--strides", "2.5"], r"argument --strides: '2\.5' is not integers"),
        (["plan", "1,2,2,2,3", "1,1,1,4,3", "--workers", "two"], r"argument --workers: invalid int value: 'two'"),
        (["run", "x.npy", "f.npy"], r"the following arguments are required: --output"),
        (["demo", "--input", "x.npy", "--size", "8"], r"argument --size: not allowed with argument --input"),
    ],
)
def test_bad_words_show_the_usage(capsys, words, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    refused(capsys, stopped.value.code, text, usage=True)


# --- run


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--strides", "2", "--workers", "2"], {"strides": 2}),
        (["--strides", "2,1,3", "--padding", "VALID", "--dilations", "1,2,1"], None),
        (
            ["--strides=2", "--output-shape=1,5,8,9,4", "--algorithm=col2im"],
            {"strides": 2, "output_shape": (1, 5, 8, 9, 4)},
        ),
    ],
)
def test_run_writes_what_the_definition_gives(files, capsys, words, options):
    if options is None:
        options = {"strides": (2, 1, 3), "padding": "VALID", "dilations": (1, 2, 1)}
    assert run(files, *words) == 0
    expected = oracle.conv3d_transpose(np.load(files / "x.npy"), np.load(files / "f.npy"), **options)
    result = np.load(files / "y.npy", allow_pickle=False)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected)
    assert names(files) == ["f.npy", "x.npy", "y.npy"]
    captured = capsys.readouterr()
    line = (
        rf"{re.escape(str(files / 'y.npy'))}: float32 {re.escape(str(list(expected.shape)))}, \w+, \S+ s, \S+ GFLOP/s\n"
    )
    assert re.fullmatch(line, captured.out)
    assert captured.err == ""


def test_run_in_channels_first_with_fortran_order_and_byte_swapped_files(files):
    x, f = np.load(files / "x.npy"), np.load(files / "f.npy")
    np.save(files / "x.npy", np.asfortranarray(np.moveaxis(x, -1, 1).astype(">f4")))
    np.save(files / "f.npy", f.astype(np.float64))
    assert run(files, "--data-format", "NCDHW", "--strides", "2") == 0
    result = np.load(files / "y.npy")
    assert result.dtype == np.float64
    np.testing.assert_array_equal(np.moveaxis(result, 1, -1), oracle.conv3d_transpose(x, f, strides=2))


def test_run_with_an_empty_batch_writes_an_empty_array(files):
    np.save(files / "x.npy", np.zeros((0, 3, 4, 5, 2), np.float32))
    assert run(files, "--strides", "2") == 0
    assert np.load(files / "y.npy").shape == (0, 6, 8, 10, 4)
    assert names(files) == ["f.npy", "x.npy", "y.npy"]


def test_run_replaces_a_file_only_when_forced(files, capsys):
    (files / "y.npy").write_text("dear")
    refused(capsys, run(files), r"y\.npy: this file exists; --force replaces it")
    assert (files / "y.npy").read_text() == "dear"
    assert run(files, "--force") == 0
    assert np.load(files / "y.npy").shape == (1, 3, 4, 5, 4)


def test_run_does_not_replace_a_file_that_came_to_be_meanwhile(files, capsys, monkeypatch):
    _replace_plan(monkeypatch, lambda out: (files / "y.npy").write_text("dear"))
    refused(capsys, run(files), r"y\.npy: this file exists; --force replaces it")
    assert (files / "y.npy").read_text() == "dear"
    assert names(files) == ["f.npy", "x.npy", "y.npy"]


def test_run_may_replace_its_own_input(files):
    x, f = np.load(files / "x.npy"), np.load(files / "f.npy")
    assert run(files, "--force", output="x.npy") == 0
    np.testing.assert_array_equal(np.load(files / "x.npy"), oracle.conv3d_transpose(x, f))


def test_run_follows_a_symbolic_link(files):
    (files / "there").mkdir()
    (files / "y.npy").symlink_to(files / "there" / "real.npy")
    assert run(files) == 0
    assert (files / "y.npy").is_symlink()
    assert np.load(files / "there" / "real.npy").shape == (1, 3, 4, 5, 4)
    assert names(files / "there") == ["real.npy"]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX'")
def test_run_leaves_the_mode_to_the_umask(files):
    before = os.umask(0o027)
    try:
        assert run(files) == 0
    finally:
        os.umask(before)
    assert (files / "y.npy").stat().st_mode & 0o777 == 0o640


def _archive(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def _raw(path, data):
    path.write_bytes(data)


def _truncated(path):
    np.save(path, np.zeros(VALUE_SHAPE, np.float32))
    os.truncate(path, 200)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, r"bad\.npy cannot be read: .*No such file or directory"),
        (lambda path: path.mkdir(), r"bad\.npy cannot be read: .*Is a directory|Permission denied"),
        (lambda path: _raw(path, b""), r"bad\.npy is not a \.npy file$"),
        (lambda path: _raw(path, b"hello, world"), r"bad\.npy is not a \.npy file$"),
        (_archive, r"bad\.npy is not a \.npy file, but an \.npz: save the arrays in it one by one"),
        (lambda path: _raw(path, b"\x93NUMPY\x01\x00\x76\x00"), r"bad\.npy cannot be read: EOF: reading array header"),
        (_truncated, r"bad\.npy cannot be read: mmap length is greater than file size"),
        (
            lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
            r"bad\.npy cannot be read: Array can't be memory-mapped: Python objects in dtype",
        ),
        (
            lambda path: np.save(path, np.zeros(VALUE_SHAPE, np.uint16).view("V2")),
            r"bad\.npy holds raw 2-byte items \(dtype '\|V2'\): .*bfloat16.*save \.astype\(np\.float32\) instead",
        ),
        (lambda path: np.save(path, np.zeros(VALUE_SHAPE, np.int32)), r"bad\.npy, .*int32.*\.astype\(np\.float32\)"),
        (lambda path: np.save(path, np.zeros(VALUE_SHAPE, bool)), r"bad\.npy, .*bool.*\.astype\(np\.float32\)"),
        (lambda path: np.save(path, np.zeros(VALUE_SHAPE, "U3")), r"bad\.npy, .*(<U3|str)"),
        (lambda path: np.save(path, np.zeros(VALUE_SHAPE, "f4,f4")), r"bad\.npy, .*f4"),
        (lambda path: np.save(path, np.float32(3)), r"value must be 5-D \(NDHWC\), got 0-D, shape \(\)"),
        (
            lambda path: np.save(path, np.zeros((3, 4, 5, 2), "f4")),
            r"value must be 5-D .* got 4-D, shape \(3, 4, 5, 2\)",
        ),
        (lambda path: np.save(path, np.zeros((1, 3, 4, 5, 7), "f4")), r"filter has 2 input channels .*value has 7"),
    ],
)
def test_run_refuses_a_value(files, capsys, make, text):
    make(files / "bad.npy")
    before = names(files)
    refused(capsys, run(files, value="bad.npy"), text)
    assert names(files) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--strides", "2", "--output-shape", "1,9,8,10,4"], r"output_shape\[1\]=9 is out of reach: .* allow 5 to 6"),
        (["--padding", "FULL"], r"padding must be 'SAME' or 'VALID', got 'FULL'"),
        (["--dilations", "1,0,1"], r"dilations=\[1, 0, 1\] must be at least 1 everywhere, got 0"),
        (["--algorithm", "magic"], r"algorithm.*'magic'"),
    ],
)
def test_run_refuses_an_option(files, capsys, words, text):
    refused(capsys, run(files, *words), text)
    assert names(files) == ["f.npy", "x.npy"]


def test_run_refuses_a_missing_filter(files, capsys):
    refused(capsys, run(files, filter="none.npy"), r"none\.npy cannot be read: .*No such file")


def test_run_refuses_an_output_in_no_folder_or_that_is_one(files, capsys):
    refused(capsys, run(files, output="no/y.npy"), r"y\.npy: there is no folder .*no$")
    (files / "y.npy").mkdir()
    refused(capsys, run(files, "--force"), r"y\.npy: this is not a regular file; it is left as it is")
    assert names(files) == ["f.npy", "x.npy", "y.npy"]


def test_run_refuses_before_any_work_when_the_disk_is_full(files, capsys, monkeypatch):
    def full(file, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    _replace_plan(monkeypatch, lambda out: pytest.fail("work was begun"))
    refused(capsys, run(files), r"y\.npy: \[Errno 28\] No space left on device")
    assert names(files) == ["f.npy", "x.npy"]


def test_run_writes_where_a_file_system_cannot_reserve(files, monkeypatch):
    def unable(file, offset, size):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    assert run(files) == 0
    assert np.load(files / "y.npy").shape == (1, 3, 4, 5, 4)


class _Replaced:
    """A plan that does something else when it is called; half of the output is written by then."""

    def __init__(self, plan, act):
        self._plan, self._act = plan, act

    def __getattr__(self, name):
        return getattr(self._plan, name)

    def __call__(self, value, filter, out=None, progress=None):
        out[:, : out.shape[1] // 2] = 1
        self._act(out)


def _replace_plan(monkeypatch, act):
    real = gemmconv.plan_conv3d_transpose
    monkeypatch.setattr(
        gemmconv, "plan_conv3d_transpose", lambda *args, **kwargs: _Replaced(real(*args, **kwargs), act)
    )


def _raise(error):
    raise error


def test_a_failure_in_mid_run_leaves_no_file(files, capsys, monkeypatch):
    seen = []

    def fail(out):
        seen.extend(names(files))
        raise MemoryError

    _replace_plan(monkeypatch, fail)
    refused(capsys, run(files), r"out of memory: MemoryError")
    assert names(files) == ["f.npy", "x.npy"]
    assert len(seen) == 3
    assert "y.npy" not in seen


def test_a_bug_in_mid_run_keeps_its_traceback_and_leaves_no_file(files, monkeypatch):
    _replace_plan(monkeypatch, lambda out: _raise(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(files)
    assert names(files) == ["f.npy", "x.npy"]


def test_an_interrupt_in_mid_run_leaves_no_file_and_gives_130(files, capsys, monkeypatch):
    _replace_plan(monkeypatch, lambda out: _raise(KeyboardInterrupt()))
    assert run(files) == 130
    assert capsys.readouterr().err == "gemmconv: interrupted\n"
    assert names(files) == ["f.npy", "x.npy"]


def test_a_forced_run_that_fails_leaves_the_old_file(files, monkeypatch):
    (files / "y.npy").write_text("dear")
    _replace_plan(monkeypatch, lambda out: _raise(KeyboardInterrupt()))
    assert run(files, "--force") == 130
    assert (files / "y.npy").read_text() == "dear"
    assert names(files) == ["f.npy", "x.npy", "y.npy"]


# The blocks of a real plan, with a pause after each, so that the signal meets the engine at work.
_SLOWLY = """
import signal, sys, time
from gemmconv import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have them ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
class Slow(cli._Bar):
    def __call__(self, done, total):
        print("at work", flush=True)
        time.sleep(1)
cli._Bar = Slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="other systems send no such signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_process_without_a_file(files, number, status):
    words = ["run", str(files / "x.npy"), str(files / "f.npy"), "--output", str(files / "y.npy"), "--strides", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", _SLOWLY, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "at work\n"
        assert len(names(files)) == 3
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in err
    assert names(files) == ["f.npy", "x.npy"]


# --- the progress bar


_EAGERLY = """
import sys
from gemmconv import cli
cli._BAR_AFTER_S = float(sys.argv.pop(1))
cli._BAR_EVERY_S = 0
sys.exit(cli.main(sys.argv[1:]))
"""


def _on_a_terminal(files, after_s):
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    ours, theirs = pty.openpty()
    words = ["run", str(files / "x.npy"), str(files / "f.npy"), "--output", str(files / "y.npy"), "--strides", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", _EAGERLY, after_s, *words], stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux' word for the end of a pseudo-terminal
                break
            if not data:
                break
            text += data
    os.close(ours)
    assert process.returncode == 0
    return text.decode()


def test_a_watched_run_that_takes_long_draws_its_progress_and_wipes_it(files):
    text = _on_a_terminal(files, "0")
    drawn = text.split("\r")
    assert re.fullmatch(r"\[#{40}\] 100 %, 0 s left *", drawn[-3])
    assert drawn[-2] == " " * 70
    assert drawn[-1] == ""
    shares = [int(re.search(r"(\d+) %", line)[1]) for line in drawn[1:-2]]
    assert shares[-1] == max(shares) == 100


def test_a_watched_run_that_is_quick_draws_nothing(files):
    assert _on_a_terminal(files, "60") == ""


def test_an_unwatched_run_draws_nothing(files, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_BAR_AFTER_S", 0)
    monkeypatch.setattr(cli, "_BAR_EVERY_S", 0)
    assert run(files) == 0
    assert capsys.readouterr().err == ""


def test_the_bar_is_drawn_seldom_and_survives_a_closed_terminal(monkeypatch):
    class Terminal:
        def __init__(self):
            self.lines = []

        def isatty(self):
            return True

        def write(self, text):
            if len(self.lines) == 2:
                raise OSError(5, "Input/output error")
            self.lines.append(text)

        def flush(self):
            pass

    terminal, now = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with cli._Bar() as bar:
        for done in range(1, 101):
            now[0] += 0.04
            bar(done, 100)
            if now[0] < 2:
                assert terminal.lines == []
    assert terminal.lines[0].rstrip() == "\r[####################....................] 50 %, 2 s left"
    assert terminal.lines[1].rstrip() == "\r[#####################...................] 53 %, 2 s left"
    assert len(terminal.lines) == 2


# --- demo


def test_demo_upsamples_the_phantom(capsys):
    assert cli.main(["demo", "--size", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("up-sampling [12, 12, 12] two-fold by a transposed convolution")
    assert str(gemmconv.plan_conv3d_transpose((1, 14, 14, 14, 1), (4, 4, 4, 1, 1), strides=2)) in captured.out
    assert re.search(r"first call: \S+ s, \S+ GFLOP/s\nfastest of \d+ more: \S+ s, \S+ GFLOP/s\n", captured.out)
    found = re.search(
        r"largest error against interpolation in float64: (\S+) \(allowed (\S+)\), all 13824 cells", captured.out
    )
    assert float(found[1]) <= float(found[2]) < 3e-6
    assert "--picture FILE.png draws the middle slices" in captured.out


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, bool])
def test_demo_upsamples_a_volume_of_ones_own(tmp_path, capsys, dtype):
    volume = np.random.default_rng(3).integers(0, 2 if dtype is bool else 100, (5, 1, 7)).astype(dtype)
    np.save(tmp_path / "v.npy", volume)
    assert cli.main(["demo", "--input", str(tmp_path / "v.npy"), "--workers", "1"]) == 0
    assert "all 280 cells" in capsys.readouterr().out
    assert names(tmp_path) == ["v.npy"]


def test_demo_says_when_the_result_is_wrong(capsys, monkeypatch):
    real = demo.largest_error

    def spoiled(volume, result):
        result[3, 4, 5] += 1e-4
        return real(volume, result)

    monkeypatch.setattr(demo, "largest_error", spoiled)
    assert cli.main(["demo", "--size", "8"]) == 1
    assert capsys.readouterr().err == "gemmconv: error: the result is wrong beyond rounding\n"


def test_the_demos_check_sees_every_cell():
    volume = demo.phantom(18)
    wide = volume.astype(np.float64)
    exact = np.zeros((36, 36, 36))
    for index in np.ndindex(exact.shape):  # the definition of linear interpolation, cell by cell
        corners = []
        for i in index:
            at = min(max((i + 0.5) / 2 - 0.5, 0), 17)
            low = min(int(at), 16)
            corners.append(((low, 1 - (at - low)), (low + 1, at - low)))
        exact[index] = sum(
            a * b * c * wide[i, j, k] for i, a in corners[0] for j, b in corners[1] for k, c in corners[2]
        )
    assert demo.largest_error(volume, exact) < 1e-12
    for cell in ((0, 0, 0), (31, 7, 8), (32, 7, 8), (35, 35, 35)):  # slabs meet at 32
        spoiled = exact.copy()
        spoiled[cell] += 0.5
        assert demo.largest_error(volume, spoiled) == pytest.approx(0.5)
    spoiled[34, 4, 4] = np.nan
    assert np.isnan(demo.largest_error(volume, spoiled))


def test_the_phantom_is_a_head():
    volume = demo.phantom(64)
    assert volume.dtype == np.float32
    assert volume[0].max() == volume[:, 0].max() == volume[:, :, 0].max() == 0
    assert volume[32, 32, 32] == pytest.approx(0.2)  # brain
    assert volume[32, 60, 32] == pytest.approx(1)  # skull
    assert volume[32, 32, 39] == pytest.approx(0, abs=1e-6)  # a ventricle


def test_demo_draws_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the picture, is not installed")
    assert cli.main(["demo", "--size", "6", "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith("p.png: the middle slices, before and after\n")
    refused(
        capsys, cli.main(["demo", "--size", "6", "--picture", str(tmp_path / "p.txt")]), r"p\.txt: the name must end"
    )
    refused(
        capsys, cli.main(["demo", "--size", "6", "--picture", str(tmp_path / "no" / "p.png")]), r"there is no folder"
    )


def test_demo_without_matplotlib_refuses_a_picture_before_any_work(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status = cli.main(["demo", "--size", "6", "--picture", "p.png"])
    refused(capsys, status, r"--picture needs matplotlib \(pip install matplotlib\)")
    assert cli.main(["demo", "--size", "6"]) == 0


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((3, 4), np.float32), r"v\.npy must be a 3-D array of real numbers, got float32 \[3, 4\]"),
        (np.zeros((3, 0, 4), np.float32), r"v\.npy must be a 3-D array of real numbers, got float32 \[3, 0, 4\]"),
        (np.zeros((3, 2, 4), np.complex64), r"v\.npy must be a 3-D array of real numbers, got complex64 \[3, 2, 4\]"),
        (np.full((1, 1, 1), np.nan), r"v\.npy must hold finite float32 numbers: NaN or Inf cannot be compared"),
        (np.full((1, 1, 1), 1e300), r"v\.npy must hold finite float32 numbers"),
    ],
)
def test_demo_refuses_a_volume(tmp_path, capsys, array, text):
    np.save(tmp_path / "v.npy", array)
    refused(capsys, cli.main(["demo", "--input", str(tmp_path / "v.npy")]), text)


def test_demo_refuses_a_size_and_workers(capsys):
    refused(capsys, cli.main(["demo", "--size", "0"]), r"--size 0 must be at least 1")
    refused(capsys, cli.main(["demo", "--size", "4", "--workers", "0"]), r"workers.*\b0\b")


# --- the module


def test_python_m_gemmconv_passes_the_status_on():
    done = subprocess.run(
        [sys.executable, "-m", "gemmconv", "plan", "1,1", "1,1"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gemmconv: error: ")


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise on other systems")
def test_a_reader_that_stops_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "gemmconv", "info"], check=False, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_nothing_optional_is_imported():
    code = (
        "import sys; from gemmconv import cli; cli.main(['info']); cli.main(['demo', '--size', '4']);"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'ml_dtypes')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
