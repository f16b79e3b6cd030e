"""Memory of large results that is used again: when, how much of it is kept, and that no two results ever share it."""

import copy
import pickle
import random
import sys
import threading

import numpy as np
import oracle
import pytest
from oracle import dtype_named, integers, same_bits

import gemmconv
from gemmconv import conv3d_transpose, results

MIB = 1 << 20
F4 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def nothing_idle():
    results.clear()
    yield
    results.clear()


def address(array):
    return array.__array_interface__["data"][0]


def idle_bytes():
    return sum(memory.nbytes for memory in results._idle.values())


def test_memory_of_a_dropped_result_is_used_again():
    first = results.empty((9, MIB), F4)
    at = address(first)
    assert not results._idle
    del first
    assert idle_bytes() == 36 * MIB
    again = results.empty((3, 3, MIB), F4)
    assert (address(again), again.shape) == (at, (3, 3, MIB))
    assert not results._idle


@pytest.mark.parametrize("view", [lambda a: a[3:, ::2], lambda a: a.T, lambda a: a.view(np.int32), memoryview])
def test_memory_is_not_used_again_while_a_view_is_alive(view):
    result = results.empty((9, MIB), F4)
    result[...] = 7
    kept, at = view(result), address(result)
    del result
    other = results.empty((9, MIB), F4)
    assert address(other) != at
    other[...] = 8
    assert np.asarray(kept).view(np.float32).min() == 7 == np.asarray(kept).view(np.float32).max()
    del kept
    assert idle_bytes() == 36 * MIB


def test_small_results_are_left_to_malloc():
    result = results.empty(((1 << 15) - 1,), F4)
    assert result.flags.owndata
    del result
    assert not results._idle


@pytest.mark.parametrize(("mib", "fits"), [(39, False), (40, True), (50, True), (51, False)])
def test_memory_is_at_most_a_quarter_larger_than_its_result(mib, fits):
    """Idle are 50 MiB."""
    result = results.empty((50, MIB // 4), F4)
    at = address(result)
    del result
    other = results.empty((mib, MIB // 4), F4)
    assert (address(other) == at) == fits
    assert idle_bytes() == (0 if fits else 50 * MIB)


def test_at_most_128_mib_are_idle_and_the_first_to_become_idle_go_first():
    sizes = [64, 40, 33, 200, 100]
    alive = [results.empty((mib, MIB // 4), F4) for mib in sizes]
    left = []
    while alive:
        del alive[0]
        left.append([memory.nbytes // MIB for memory in results._idle.values()])
    assert left == [[64], [64, 40], [40, 33], [40, 33], [100]]


def test_clear_cache_frees_idle_memory_and_no_other():
    kept, dropped = results.empty((9, MIB), F4), results.empty((9, MIB), F4)
    kept[...] = 5
    del dropped
    gemmconv.clear_cache()
    assert not results._idle
    assert (kept == 5).all()


def test_a_call_without_enough_memory_frees_what_is_idle_and_begins_again(monkeypatch):
    value, filter = np.ones((1, 3, 3, 3, 2), np.float32), np.ones((2, 2, 2, 2, 2), np.float32)
    wanted = conv3d_transpose(value, filter, strides=2)
    empty, asked = np.empty, []

    def scarce(*arguments):
        asked.append(len(results._idle))
        if asked[-1] or len(asked) > 50:
            raise MemoryError
        return empty(*arguments)

    del (result := [results.empty((9, MIB), F4)])[0]
    with monkeypatch.context() as held:
        held.setattr(np, "empty", scarce)
        assert same_bits(conv3d_transpose(value, filter, strides=2), wanted)
        assert asked[:2] == [1, 0]
        assert not result
        asked[:] = range(60)
        with pytest.raises(MemoryError):
            conv3d_transpose(value, filter, strides=2)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_a_result_is_an_array_like_any_other(name):
    dtype = dtype_named(name)
    shape = (3, 11, MIB)
    result = results.empty(shape, dtype)
    assert (type(result), result.dtype, result.shape) == (np.ndarray, dtype, shape)
    assert result.flags.carray  # C-contiguous, aligned and writeable
    result[...] = 2
    for other in (copy.deepcopy(result[:, :, :9]), pickle.loads(pickle.dumps(result[:, :, :9]))):
        assert other.dtype == dtype
        assert (other == 2).all()


def test_results_of_calls_are_what_they_are_without(monkeypatch):
    """All memory is used again as soon as it can be: earlier results that are still there do not change."""
    monkeypatch.setattr(results, "LEAST_BYTES", 1)
    monkeypatch.setattr(results, "_LARGER", 1e9)
    rng, found, memory = np.random.default_rng(5), [], set()
    for i in range(40):
        coarse = (1, *rng.integers(1, 5, 3), 3)
        value, filter = integers(rng, coarse, np.float32), integers(rng, (3, 2, 3, 4, 3), np.float32)
        result = conv3d_transpose(value, filter, strides=2, workers=2)
        assert not result.flags.owndata
        memory.add(address(result))
        wanted = oracle.conv3d_transpose(value, filter, result.shape, (2, 2, 2), "SAME")
        found = [*found[-2:], (result, oracle.rounded(wanted, np.dtype(np.float32)))] if i % 3 else []
        assert all(same_bits(*pair) for pair in found)
    assert len(memory) < 20


def test_results_never_share_memory_whatever_threads_do():
    """Threads take and drop results, and pass some on to be dropped by others."""
    errors, passed = [], []
    usual = sys.getswitchinterval()

    def work(number):
        rng, mine = random.Random(number), {}
        try:
            for i in range(300):
                tag = number * 1000 + i
                result = results.empty((rng.randint(33, 60), MIB // 4), F4)
                result[0, :4] = result[-1, -4:] = tag
                mine[tag] = result
                if len(mine) > 2:
                    old = rng.choice(list(mine))
                    values = {*mine[old][0, :4], *mine[old][-1, -4:]}
                    if values != {old}:
                        errors.append((old, values))
                    passed.append(mine.pop(old))
                if len(passed) > 3:
                    passed.pop(0)
                del result
        except Exception as error:
            errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert not errors
    passed.clear()
    assert idle_bytes() <= results.MOST_IDLE_BYTES


def test_few_results_are_kept():
    made = [results.empty((1 << 15,), F4) for _ in range(50)]
    del made
    assert len(results._idle) == results._MOST_IDLE
