"""gemmconv against TensorFlow, PyTorch, ONNX Runtime, JAX and ONNX's own cases, where they are installed.

Each peer runs in a process of its own: they bring thread pools and read environment variables that do not go together.
A peer that is not installed is skipped, or with GEMMCONV_REQUIRE_PEERS=1 is a failure.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import gemmconv

PEERS = Path(__file__).parent / "peers"
TIMEOUT_S = 300

# script, its arguments, the modules it needs, and how many comparisons are the least a peer must allow
RUNS = {
    "tensorflow-onednn": ("tensorflow_peer.py", ["--mode", "onednn"], ["tensorflow"], 150),
    "tensorflow-reference": (
        "tensorflow_peer.py",
        ["--mode", "reference", "--seed", "2", "--problems", "1200"],
        ["tensorflow"],
        200,
    ),
    "tensorflow-family-onednn": ("tensorflow_family_peer.py", ["--mode", "onednn"], ["tensorflow"], 1200),
    "tensorflow-family-reference": (
        "tensorflow_family_peer.py",
        ["--mode", "reference", "--seed", "2"],
        ["tensorflow"],
        300,
    ),
    "torch": ("torch_peer.py", [], ["torch"], 500),
    "onnxruntime": ("onnxruntime_peer.py", [], ["onnxruntime", "onnx"], 500),
    "jax": ("jax_peer.py", [], ["jax", "ml_dtypes"], 180),
    "onnx-cases": ("onnx_cases.py", [], ["onnx"], 8),
    "compat-torch": ("compat_torch_peer.py", [], ["torch"], 4000),
    "compat-onnxruntime": ("compat_onnxruntime_peer.py", [], ["onnxruntime", "onnx"], 1400),
    "compat-onnx-conv-transpose": ("compat_onnx_cases.py", ["ConvTranspose"], ["onnx"], 11),
    "migration-keras": ("migration_peer.py", ["--framework", "keras"], ["tensorflow"], 60),
    "migration-jax": ("migration_peer.py", ["--framework", "jax"], ["jax"], 170),
    "compat-onnx-conv": ("compat_onnx_cases.py", ["Conv"], ["onnx"], 6),
}


def require(modules: list[str]) -> None:
    """Skip the test if a module is missing, or fail it where every peer is required."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"The peer cannot be compared with: {' and '.join(missing)} not installed."
        if os.environ.get("GEMMCONV_REQUIRE_PEERS") == "1":
            pytest.fail(f"{reason} GEMMCONV_REQUIRE_PEERS=1 requires every peer.")
        pytest.skip(reason)


@pytest.mark.parametrize("name", RUNS)
def test_peer_agrees(name: str) -> None:
    """The script finds no disagreement, and compared enough for that to mean something."""
    script, arguments, modules, least = RUNS[name]
    require(modules)
    package = str(Path(gemmconv.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    finished = subprocess.run(
        [sys.executable, str(PEERS / script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert finished.returncode == 0, f"{script} ended with {finished.returncode}:\n{finished.stderr[-6000:]}"
    report = json.loads(finished.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    assert report["disagreements"] == 0
    assert report["compared"] >= max(least, report["minimum"])


@pytest.fixture(scope="module")
def common() -> ModuleType:
    """The module that the scripts share."""
    spec = importlib.util.spec_from_file_location("gemmconv_peers_common", PEERS / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_problems_deal_every_small_axis(common: ModuleType) -> None:
    """600 problems hold every kernel, stride, dilation and reachable output size of the small axes."""
    dealt = {"SAME": set(), "VALID": set()}
    for problem in (common.make_problem(1, index) for index in range(600)):
        dealt[problem.padding].update(problem.axes)
    for padding, axes in dealt.items():
        assert not set(common.every_axis(padding, (1, 2, 3))) - axes


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_reachable_sizes_are_those_a_convolution_maps_back(common: ModuleType, padding: str) -> None:
    """An output size is reachable exactly when the forward convolution makes it the input's size."""
    for n, k, s, d in itertools.product(range(1, 5), range(1, 5), range(1, 5), range(1, 4)):
        span = (k - 1) * d + 1
        forward = {o: -(-o // s) if padding == "SAME" else max(0, (o - span) // s + 1) for o in range(n * s + span + s)}
        assert list(common.reachable(padding, n, k, s, d)) == [o for o, size in forward.items() if size == n]


def test_a_problem_is_found_again_by_seed_and_index(common: ModuleType) -> None:
    """The arrays too, so that a disagreement can be reproduced alone."""
    first, again, other = (common.make_problem(seed, 41) for seed in (3, 3, 4))
    assert first == again != other
    for one, two in zip(first.arrays(), again.arrays(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("got", "exact", "text"),
    [
        (np.float32([1, 2, 0]), True, None),
        (np.float32([1, 2 + 2e-7, 0]), True, "1 of 3 cells differ"),
        (np.float32([1, 2 + 2e-7, 0]), False, None),
        (np.float32([1, 2 + 1e-5, 0]), False, "of the largest output"),
        (np.float32([1, np.nan, 0]), False, "of the largest output"),
        (np.float32([1, np.inf, 0]), False, "of the largest output"),
        (np.float32([1, 2, -0.0]), False, "-0.0"),
        (np.float64([1, 2, 0]), False, "float64"),
        (np.float32([[1, 2, 0]]), False, "(1, 3)"),
        ([1.0, 2.0, 0.0], False, "list"),
    ],
)
def test_the_comparison_can_fail(common: ModuleType, got: object, exact: bool, text: str | None) -> None:
    """Each way a result can be wrong is seen."""
    wrong, _ = common.difference(got, np.float32([1, 2, 0]), exact, common.BOUNDS["float32"])
    if text is None:
        assert wrong is None
    else:
        assert wrong is not None
        assert text in wrong


def test_too_few_comparisons_fail(common: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that refuses everything does not pass."""
    assert common.Report("peer", "0").finish(minimum=0) == 0
    assert common.Report("peer", "0").finish(minimum=1) == 1
    assert common.Report("peer", "0").finish(minimum=0, features=["dilated"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["disagreements"] == 1


def test_a_missing_peer_is_skipped_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMMCONV_REQUIRE_PEERS=1 turns the skip into a failure."""
    monkeypatch.delenv("GEMMCONV_REQUIRE_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_peer not installed"):
        require(["json", "no_such_peer"])
    monkeypatch.setenv("GEMMCONV_REQUIRE_PEERS", "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_peer not installed"):
        require(["json", "no_such_peer"])
