"""Every measurement of bench/ at toy size, so that none can rot, and the obvious version against the oracle."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.layers import Layer, layers, obvious  # noqa: E402


def bench(*arguments, **environ):
    """Run `python -m bench` and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layers_are_those_of_the_file():
    """Twenty of them, each a problem that can be planned."""
    found = layers()
    assert len(found) == len({layer.name for layer in found}) == 20
    by_name = {layer.name: layer.plan() for layer in found}
    assert by_name["gan3d_g1"].output_shape == (1, 4, 4, 4, 512)
    assert by_name["brain_odd"].output_shape == (1, 37, 44, 37, 32)
    assert by_name["dilated_256"].output_shape == (1, 12, 13, 13, 256)
    assert by_name["k3s1_32"].flops == 2 * 10 * 100 * 100 * 32 * 32 * 27


@pytest.mark.parametrize(
    ("kernel", "strides", "dilations", "padding"),
    [
        ((4, 4, 4), (2, 2, 2), (1, 1, 1), "SAME"),
        ((3, 2, 1), (1, 3, 2), (2, 1, 3), "SAME"),
        ((3, 3, 2), (2, 1, 4), (1, 2, 1), "VALID"),
    ],
)
def test_obvious_version_is_right(kernel, strides, dilations, padding):
    """It is what ratios are taken against, so it is held to the oracle too."""
    rng = np.random.default_rng(1)
    layer = Layer("toy", (2, 3, 4, 5, 6), (*kernel, 7, 6), None, strides, dilations, padding)
    value, filter = (oracle.integers(rng, s, np.float32) for s in (layer.value_shape, layer.filter_shape))
    plan = layer.plan()
    exact = oracle.conv3d_transpose(value, filter, plan.output_shape, strides, padding, "NDHWC", dilations)
    assert np.array_equal(obvious(layer, plan, value, filter), exact)
    assert np.array_equal(layer.gemmconv(value, filter, 1), exact)


def test_speed():
    """A line for the layer, with a ratio inside its interval, and the mean of one."""
    text = bench("speed", "--rounds", "3", "--only", "gan3d_g1", "--workers", "1", "--pause", "0")
    ratio, low, high = map(float, re.search(r"^gan3d_g1 .* ([\d.]+) \(([\d.]+) to ([\d.]+)\)$", text, re.M).groups())
    assert low <= ratio <= high
    assert f"geometric mean of the ratios: {ratio:.2f}" in text


def test_speed_stops_at_a_wrong_result(monkeypatch):
    """A contender that is wrong is not timed."""
    from bench import __main__ as main

    monkeypatch.setattr(Layer, "gemmconv", lambda self, *args: np.zeros(self.plan().output_shape, np.float32))
    with pytest.raises(SystemExit, match=r"gan3d_g1: results differ by 1\.0e\+00 of the largest output"):
        main.main(["speed", "--only", "gan3d_g1", "--rounds", "2"])


@pytest.mark.skipif(sys.platform != "linux", reason="Memory is read from /proc, which only Linux has.")
def test_memory():
    """A layer of 8 MB in a fresh process: what it takes beyond operands and result is a few MiB, not nothing."""
    text = bench("memory", "--only", "unetr_bottom")
    assert 0 < float(re.search(r"unetr_bottom +([\d.]+) MiB", text)[1]) < 100
    assert "largest: " in text


def test_latency_and_import():
    """Two medians and a ratio."""
    assert len(re.findall(r"[\d.]+ us, median of 1000", bench("latency"))) == 2
    assert re.search(r"^ratio \d\.\d\d$", bench("import", "--rounds", "1"), re.M)


def test_variables_that_choose_kernels_are_removed():
    """Unless they are to be kept."""
    assert "removed from the environment: OPENBLAS_CORETYPE" in bench("latency", OPENBLAS_CORETYPE="Haswell")
    assert "removed" not in bench("latency", "--keep-env", OPENBLAS_CORETYPE="Haswell")
