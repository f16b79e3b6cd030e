"""Workers and the BLAS limit: what a call does to the process while it runs, and that nothing of it is left.

Numbers of BLAS threads are read from the loaded libraries themselves, which start at two. Four cores are pretended, so
that calls overlap on a machine of any size. What needs a process of its own (forks, exits) is in test_threads_process.
"""

import contextlib
import contextvars
import functools
import gc
import itertools
import json
import os
import random
import re
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
import scipy.linalg.cython_blas
import threadpoolctl

from gemmconv import arrays, limit, threads
from gemmconv.lowerings.copies import is_finite
from gemmconv.threads import get_workers, resolve_workers, run, set_workers

LIBRARIES = [lib for lib in threadpoolctl.ThreadpoolController().lib_controllers if lib.user_api == "blas"]
# From threadpoolctl 3.8 on the thread that set a limit owns it.
OWNED = any(hasattr(library, "clear_controlling_thread") for library in LIBRARIES)
WAIT_S = 20  # for what happens at once unless something is broken
MATRIX = np.arange(81.0 * 81).reshape(81, 81) % 7  # 81 ** 3 products: more than OpenBLAS keeps to one thread by itself
PRODUCT = MATRIX @ MATRIX

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="threadpoolctl knows no BLAS of this NumPy and SciPy")


def numbers():
    return {library.num_threads for library in LIBRARIES}


def set_numbers(number):
    for library in LIBRARIES:
        if OWNED:
            library.clear_controlling_thread(force=True)
        library.set_num_threads(number)
        if OWNED:
            library.clear_controlling_thread(force=True)


@pytest.fixture(scope="module", autouse=True)
def pretended_cores():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "usable_cores", lambda: 4)
        patch.setattr(threads, "_pool", threads._Pool())
        yield


@pytest.fixture(autouse=True)
def two_blas_threads():
    old = [library.num_threads for library in LIBRARIES]
    set_numbers(2)
    yield
    left, calls = numbers(), threads._limit.calls
    for library, number in zip(LIBRARIES, old, strict=True):
        library.set_num_threads(number)
    set_numbers(max(old))
    assert left == {2}
    assert calls == 0


def nothing(index, slot):
    pass


def in_thread(function):
    """Start `function` in a thread; calling what is returned joins it and gives its result or raises its exception."""
    outcome = []

    def target():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()  # not by way of `_thread.start_new_thread` as an attribute, which tests replace

    def join():
        thread.join(WAIT_S)
        assert not thread.is_alive(), "still running: a deadlock"
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return join


class Open:
    """A call that stays open, its only task waiting, until `close`."""

    def __init__(self):
        self.begun, self.end, self.seen = threading.Event(), threading.Event(), None
        self.join = in_thread(lambda: run(self.task, 1, 1))
        assert self.begun.wait(WAIT_S)

    def task(self, index, slot):
        self.begun.set()
        assert self.end.wait(WAIT_S)
        self.seen = numbers()

    def close(self):
        self.end.set()
        self.join()


@pytest.mark.parametrize("limit_blas", [False, True])
@pytest.mark.parametrize(("count", "workers"), [(0, 3), (1, 1), (1, 4), (3, 1), (2, 3), (500, 2), (500, 4), (50, 100)])
def test_every_index_runs_once_in_a_slot_of_its_own(count, workers, limit_blas):
    done, busy, clashes, slots = [], set(), [], set()

    def task(index, slot):
        done.append(index)
        slots.add(slot)
        clashes.extend([slot] if slot in busy else [])
        busy.add(slot)
        np.matmul(MATRIX, MATRIX)
        busy.discard(slot)

    run(task, count, workers, limit_blas=limit_blas)
    assert sorted(done) == list(range(count))
    assert not clashes
    assert slots <= set(range(min(workers, count)))


@pytest.mark.parametrize(
    ("alike", "begins", "others"),
    [(True, 5, [0, 1, 2, 3, 4, 9, 8, 7, 6]), (False, 1, [0, 2, 3, 4, 5, 6, 7, 8, 9])],
)
def test_a_slot_has_a_share_and_then_what_others_have_not_begun(alike, begins, others):
    """One worker waits in its first task until the other one has done all the rest."""
    meeting, end, done = threading.Barrier(2), threading.Event(), {}

    def task(index, slot):
        done.setdefault(slot, []).append(index)
        if len(done[slot]) == 1:
            meeting.wait(WAIT_S)
        if slot == 1:
            assert end.wait(WAIT_S)
        elif len(done[slot]) == 9:
            end.set()

    run(task, 10, 2, alike=alike)
    assert done == {0: others, 1: [begins]}


def test_a_slot_is_the_same_threads_from_call_to_call(monkeypatch):
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    found = set()
    for _ in range(20):
        meeting = threading.Barrier(4)

        def task(index, slot, meeting=meeting):
            meeting.wait(WAIT_S)
            found.add((threading.get_ident(), slot, index))

        run(task, 4, 4)
    assert len(found) == 4


def test_indices_are_handed_out_in_order():
    order = []
    run(lambda index, slot: order.append(index), 1000, 1)
    assert order == list(range(1000))


def test_workers_work_at_the_same_time():
    meeting = threading.Barrier(4)
    for limit_blas in (False, True):
        run(lambda index, slot: meeting.wait(WAIT_S), 4, 4, limit_blas=limit_blas)


def test_a_single_worker_without_limit_is_the_calling_thread_and_with_it_is_not():
    seen = []
    run(lambda index, slot: seen.append(threading.get_ident()), 2, 1, limit_blas=False)
    assert seen == [threading.get_ident()] * 2
    run(lambda index, slot: seen.append(threading.get_ident()), 1, 1)
    assert seen[2] != threading.get_ident()


def test_sixteen_threads_overlap_at_random():
    seen, wrong = set(), []

    def calls(seed):
        rng, pause = random.Random(seed), threading.Event()

        def task(index, slot):
            seen.update(numbers())
            pause.wait(rng.random() * 0.002)
            if not np.array_equal(MATRIX @ MATRIX, PRODUCT):
                wrong.append(index)
            seen.update(numbers())

        for _ in range(15):
            run(task, rng.randint(1, 5), rng.randint(1, 4))
            pause.wait(rng.random() * 0.002)

    for join in [in_thread(lambda seed=seed: calls(seed)) for seed in range(16)]:
        join()
    assert seen == {1}
    assert not wrong
    assert numbers() == {2}


def test_the_limit_holds_when_the_first_call_ends_first():
    first, second = Open(), Open()
    first.close()
    assert numbers() == {1}
    second.close()
    assert (first.seen, second.seen) == ({1}, {1})
    assert numbers() == {2}


def test_without_limit_blas_keeps_its_threads():
    seen = set()
    run(lambda index, slot: seen.update(numbers()), 4, 2, limit_blas=False)
    assert seen == {2}


def test_a_limit_of_the_user_around_a_call_is_seen_and_restored():
    seen = set()
    with threadpoolctl.threadpool_limits(3):
        assert get_workers() == 3
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                run(lambda index, slot: seen.update(numbers()), 3, 3)
            assert numbers() == {3}
        with threadpoolctl.threadpool_limits(1):
            assert get_workers() == 1
            run(lambda index, slot: seen.update(numbers()), 3, 3)
            assert numbers() == {1}
        assert numbers() == {3}
    assert seen == {1}
    assert numbers() == {2}


def test_a_limit_of_the_user_between_calls_works():
    for number in (3, 1, 4):
        run(nothing, 2, 2)
        with threadpoolctl.threadpool_limits(number):
            assert numbers() == {number}
        assert numbers() == {2}


@contextlib.contextmanager
def limit_in_another_thread(number):
    begun, end = threading.Event(), threading.Event()

    def hold():
        with threadpoolctl.threadpool_limits(number):
            begun.set()
            assert end.wait(WAIT_S)

    join = in_thread(hold)
    assert begun.wait(WAIT_S)
    yield
    end.set()
    join()


def test_a_limit_owned_by_another_thread_costs_the_workers_and_warns():
    slots, seen = set(), set()

    def task(index, slot):
        slots.add(slot)
        seen.update(numbers())

    with limit_in_another_thread(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(task, 20, 2)
        assert numbers() == {3}
    if OWNED:
        assert (slots, seen) == ({0}, {3})
        [warning] = caught
        text = "gemmconv: 1 worker instead of 2, as BLAS could not be held to one thread: "
        assert str(warning.message).startswith(text)
        for library in LIBRARIES:
            name = library.filepath.rpartition("/")[2]
            assert f"{name} stays at 3 after it was set to 1: another thread has limited it" in str(warning.message)
        assert warning.category is RuntimeWarning
        assert warning.filename == __file__
    else:
        assert seen == {1}
        assert not caught
    run(lambda index, slot: seen.clear() or seen.update(numbers()), 2, 2)
    assert seen == {1}


class FakeLibrary:
    """A BLAS as threadpoolctl would show it. `stuck` ignores what is set; `local` has a number for every thread."""

    user_api, filepath = "blas", "/lib/libfake.so.3"

    def __init__(self, number, stuck=False, local=False):
        self.start, self.stuck, self.local = number, stuck, local
        self.shared, self.by_thread = number, threading.local()

    @property
    def num_threads(self):
        return getattr(self.by_thread, "number", self.start) if self.local else self.shared

    def set_num_threads(self, number):
        if self.local:
            self.by_thread.number = number
        elif not self.stuck:
            self.shared = number


@pytest.fixture
def loaded(monkeypatch):
    """Make gemmconv believe that these libraries are all there are, and that this reason bars any limit."""

    def load(*libraries, reason=""):
        pools = [limit.BlasPool(library) for library in libraries]
        monkeypatch.setattr(threads._limit, "loaded", True)
        monkeypatch.setattr(threads._limit, "pools", pools)
        monkeypatch.setattr(threads._limit, "never", reason)

    return load


def test_a_library_that_cannot_be_limited_costs_the_workers_and_warns_before_any_task(loaded):
    slots, fine = [], FakeLibrary(5)
    loaded(fine, FakeLibrary(7, stuck=True))
    text = r"1 worker instead of 3, .* one thread: libfake.so.3 stays at 7 after it was set to 1$"
    with pytest.warns(RuntimeWarning, match=text):
        run(lambda index, slot: slots.append((slot, fine.num_threads)), 3, 3)
    assert slots == [(0, 1)] * 3
    assert fine.num_threads == 5
    with pytest.warns(RuntimeWarning, match=r"gemmconv: more threads than the 1 worker, as BLAS .* stays at 7"):
        run(lambda index, slot: slots.append(slot), 1, 1)
    slots.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=text):
            run(lambda index, slot: slots.append(slot), 3, 3)
    assert slots == []
    assert fine.num_threads == 5
    assert threads._limit.calls == 0


def test_a_library_lost_while_the_call_runs_is_warned_of_after_it(loaded):
    library = FakeLibrary(7)
    loaded(library)
    done, busy, end, pause = [], threading.Barrier(4), threading.Event(), threading.Event()

    def occupy(index, slot):
        busy.wait(WAIT_S)
        assert end.wait(WAIT_S)

    def task(index, slot):
        done.append((index, slot))
        library.stuck, library.shared = True, 5  # another thread has set 5 and owns the limit from now on
        end.set()
        for _ in range(WAIT_S * 1000):  # until a second worker is there and finds that
            if index > 0 or threads._limit.pools[0].problem:
                break
            pause.wait(0.001)

    join = in_thread(lambda: run(occupy, 3, 3, limit_blas=False))
    busy.wait(WAIT_S)
    with pytest.warns(RuntimeWarning, match="1 worker instead of 2, .* stays at 5 after it was set to 1"):
        run(task, 40, 2)
    join()
    assert sorted(index for index, _ in done) == [*range(40)]
    assert len({slot for _, slot in done}) == 1
    assert library.num_threads == 5


@pytest.mark.parametrize(
    ("layer", "built", "held", "never"),
    [
        ("pthreads", "scipy-openblas", ["blas"], ""),
        ("openmp", "openblas", ["blas", "openmp"], ""),
        ("pthreads", "accelerate", ["blas"], r"SciPy's BLAS \('accelerate'\) is none that threadpoolctl can limit"),
        (None, "netlib", [], r"SciPy's BLAS \('netlib'\) is none that threadpoolctl can limit"),
    ],
)
def test_pools_that_are_held(layer, built, held, never, monkeypatch):
    found, free = limit.Limit(), []

    class Controller:
        def __init__(self):
            free.append(in_thread(lambda: found.lock.acquire(blocking=False))())
            blas, openmp = FakeLibrary(2), FakeLibrary(2)
            blas.threading_layer, openmp.user_api = layer, "openmp"
            self.lib_controllers = [openmp] if layer is None else [openmp, blas]

    monkeypatch.setattr(threads, "_limit", found)
    monkeypatch.setattr(limit.threadpoolctl, "ThreadpoolController", Controller)
    config = {"Build Dependencies": {"blas": {"name": built}}}
    monkeypatch.setattr(limit.scipy, "show_config", lambda mode: config)
    threads._load()
    threads._load()
    assert [pool.api for pool in found.pools] == held
    assert re.fullmatch(never, found.never)
    assert free == [False]  # one search, and no fork during it


def test_every_worker_holds_a_number_that_belongs_to_its_thread(loaded):
    library, seen, meeting = FakeLibrary(6, local=True), [], threading.Barrier(3)
    loaded(library)

    def task(index, slot):
        meeting.wait(WAIT_S)
        seen.append(library.num_threads)

    for _ in range(5):
        run(task, 3, 3)
    assert seen == [1] * 15
    assert library.num_threads == 6
    assert get_workers() == 4


def test_a_blas_that_nothing_can_limit_means_one_worker(loaded):
    slots = set()
    loaded(reason="SciPy's BLAS ('accelerate') is none that threadpoolctl can limit")
    assert get_workers() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lambda index, slot: slots.add(slot), 20, 1)
    with pytest.warns(RuntimeWarning, match=r"1 worker instead of 2, .*\('accelerate'\) is none that threadpoolctl"):
        run(lambda index, slot: slots.add(slot), 20, 2)
    assert slots == {0}


def test_the_default_does_not_see_the_limit_of_a_call():
    set_numbers(3)
    call = Open()
    assert numbers() == {1}
    assert get_workers() == 3
    assert resolve_workers(None) == 3
    call.close()
    assert get_workers() == 3
    set_numbers(1)
    call = Open()
    assert get_workers() == 1
    call.close()
    assert get_workers() == 1
    set_numbers(64)
    assert get_workers() == 4
    set_numbers(2)


def test_the_default_is_the_number_of_scipys_blas(loaded):
    scipys, other = FakeLibrary(2), FakeLibrary(3)
    scipys.filepath = os.path.dirname(scipy.__file__) + ".libs/libfake.so.3"
    loaded(other, scipys, other)
    assert get_workers() == 2
    loaded(FakeLibrary(1), other)  # a system's BLAS, which nothing tells from others
    assert get_workers() == 3


def test_the_default_is_right_while_calls_begin_and_end():
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            seen.add(get_workers())

    join = in_thread(read)
    for _ in range(500):
        run(nothing, 1, 1)
    stop.set()
    join()
    assert seen == {2}


def test_the_default_is_right_if_a_call_ends_in_the_middle_of_reading(loaded):
    library = FakeLibrary(3)
    loaded(library)
    call, reader = Open(), threading.get_ident()

    class Slow(FakeLibrary):
        @property
        def num_threads(self):
            number = self.shared
            if threading.get_ident() == reader and not call.end.is_set():
                call.close()
            return number

    library.__class__ = Slow
    assert get_workers() == 3
    assert library.num_threads == 3


class FailedTaskError(Exception):
    pass


@pytest.mark.parametrize("limit_blas", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_of_a_task_ends_the_call(workers, limit_blas):
    begun, ended, failed = [], [], threading.Event()

    def failing_task(index, slot):
        begun.append(index)
        if index == 1:
            failed.set()
            raise FailedTaskError(f"index {index}")
        if index > 0:  # the other workers are in the middle of theirs
            assert failed.wait(WAIT_S)
            threading.Event().wait(0.02)
        ended.append(index)

    with pytest.raises(FailedTaskError, match=r"^index 1$") as caught:
        run(failing_task, 1000, workers, limit_blas=limit_blas)
    assert caught.traceback[-1].name == "failing_task"
    assert len(begun) <= 2 * workers
    assert sorted([*ended, 1]) == sorted(begun)
    assert numbers() == {2}
    done = []
    run(lambda index, slot: done.append(index), 9, workers, limit_blas=limit_blas)
    assert sorted(done) == list(range(9))


def test_the_first_of_two_errors_is_the_one_that_is_raised():
    meeting, raised = threading.Barrier(2), threading.Event()

    def task(index, slot):
        meeting.wait(WAIT_S)
        if index == 1:
            assert raised.wait(WAIT_S)
            threading.Event().wait(0.02)
            raise FailedTaskError("the second")
        raised.set()
        raise FailedTaskError("the first")

    with pytest.raises(FailedTaskError, match="the first"):
        run(task, 2, 2)


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_any_exception_of_a_task_reaches_the_caller(error):
    def task(index, slot):
        raise error("from the task")

    with pytest.raises(error, match="from the task"):
        run(task, 2, 2)


@pytest.mark.parametrize("outer", [(1, 1, False), (1, 1, True), (2, 2, False)])
@pytest.mark.parametrize("inner", [(1, 1, False), (4, 4, True)])
def test_a_call_from_within_a_task_is_refused(outer, inner):
    def task(index, slot):
        run(nothing, *inner[:2], limit_blas=inner[2])

    with pytest.raises(RuntimeError, match="a task of a running call must not start another one"):
        run(task, *outer[:2], limit_blas=outer[2])
    run(nothing, *inner[:2], limit_blas=inner[2])


def test_a_long_call_lets_others_in():
    ended, pause = threading.Event(), threading.Event()

    class EnoughError(Exception):
        pass

    def task(index, slot):
        if ended.is_set():
            raise EnoughError
        pause.wait(0.001)

    def long_call():
        with pytest.raises(EnoughError):
            run(task, 5000, 4)

    joins = [in_thread(long_call) for _ in range(3)]
    for _ in range(3):
        run(nothing, 4, 4)
    ended.set()
    for join in joins:
        join()


def test_more_calls_than_threads():
    done = []
    for join in [in_thread(lambda: run(lambda index, slot: done.append(index), 10, 4)) for _ in range(40)]:
        join()
    assert sorted(done) == sorted([*range(10)] * 40)
    assert threads._pool.size <= 4


def refuse(*args):
    raise RuntimeError("can't start new thread")


def test_threads_of_the_user_stand_in_for_all_of_the_pool(monkeypatch):
    def call():
        done, pause = [], threading.Event()
        run(lambda index, slot: (done.append(index), pause.wait(0.001)), 30, 3)
        return sorted(done)

    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads, "SLICE_S", 0)
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    joins = [in_thread(call) for _ in range(4)]
    assert [join() for join in joins] == [list(range(30))] * 4
    assert threads._pool.size == 0


def test_a_thread_too_many_ends_at_once():
    pool = threads._Pool()
    assert pool.size == pool.most == 0
    in_thread(pool._loop)()
    assert pool.size == 0


def test_a_thread_that_cannot_be_started_is_an_error_and_the_next_call_works(monkeypatch):
    done = []

    def call(count):
        run(lambda index, slot: done.append(index), count, count)

    start = threads._thread.start_new_thread
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        call(2)
    assert done == []
    in_thread(lambda: call(2))()  # where no interrupt arrives, the calling thread stands in
    assert done == [0, 1]
    done.clear()
    monkeypatch.setattr(threads._thread, "start_new_thread", start)
    monkeypatch.setattr(threads, "_pool", threads._Pool())
    call(1)
    assert threads._pool.size == 1
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    call(3)  # with a thread there already the call goes on with what there is
    assert done == [0, 0, 1, 2]
    monkeypatch.setattr(threads._thread, "start_new_thread", start)
    busy, pause = threading.Event(), threading.Event()

    def until_another_call_waits(index, slot):
        busy.set()
        for _ in range(WAIT_S * 1000):
            if threads._pool.tokens.qsize():
                break
            pause.wait(0.001)

    join = in_thread(lambda: run(until_another_call_waits, 1, 1))
    assert busy.wait(WAIT_S)
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    call(2)  # also where the thread is busy
    monkeypatch.setattr(threads._thread, "start_new_thread", start)
    join()
    assert done == [0, 0, 1, 2, 0, 1]
    assert numbers() == {2}


@pytest.mark.parametrize("limit_blas", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_numpys_settings_belong_to_one_task(workers, limit_blas):
    seen = []

    def task(index, slot):
        seen.append((np.geterr(), np.getbufsize()))
        np.setbufsize(1 << 20)
        np.seterr(all="raise")
        np.seterrcall(lambda *args: None)

    before = np.geterr(), np.getbufsize(), np.geterrcall()
    ignored = dict.fromkeys(("divide", "over", "under", "invalid"), "ignore"), before[1]
    with np.errstate(all="raise"):
        run(task, 20, workers, limit_blas=limit_blas)
        assert set(np.geterr().values()) == {"raise"}
    assert (np.geterr(), np.getbufsize(), np.geterrcall()) == before
    assert seen == [ignored] * 20


def test_a_warning_of_numpy_does_not_come_out_of_a_task():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lambda index, slot: np.float32(1) / np.zeros(1, np.float32), 2, 2)
        run(lambda index, slot: np.float32(1) / np.zeros(1, np.float32), 1, 1, limit_blas=False)


def test_a_task_does_not_see_the_callers_context():
    variable, seen = contextvars.ContextVar("variable", default="default"), set()
    variable.set("callers")
    for limit_blas in (False, True):
        run(lambda index, slot: seen.add(variable.get()), 2, 1, limit_blas=limit_blas)
    assert seen == {"default"}


@pytest.mark.parametrize("error", [None, FailedTaskError])
def test_nothing_keeps_a_tasks_arrays_alive(error, monkeypatch):
    class Array:
        pass

    class Pool(threads._Pool):
        def submit(self, call, slot):
            if slot == 0:
                super().submit(call, slot)
            else:
                left.append(call)  # as if a token stayed in the queue, all threads being busy with other calls

    def task(index, slot, array):
        if error is not None:
            raise error

    def call():
        array = Array()
        with contextlib.suppress(FailedTaskError):
            run(functools.partial(task, array=array), 4, 4)
        return weakref.ref(array)

    left = []
    monkeypatch.setattr(threads, "_pool", Pool())
    gc.disable()
    try:
        reference = call()
        for _ in range(WAIT_S * 100):  # the thread may still be on its way back
            if reference() is None:
                break
            if not getattr(sys, "_is_gil_enabled", lambda: True)():
                gc.collect()  # without the GIL what a traceback's frames refer to waits for the collector
            threading.Event().wait(0.01)
        assert reference() is None
    finally:
        gc.enable()
    assert len(left) == 3


def test_set_workers_nests():
    default = get_workers()
    with set_workers(3):
        assert (get_workers(), resolve_workers(None), resolve_workers(1)) == (3, 3, 1)
        with set_workers(-2):
            assert get_workers() == 3
            with set_workers(1):
                assert get_workers() == 1
            assert get_workers() == 3
        with contextlib.suppress(FailedTaskError), set_workers(-1):
            assert get_workers() == 4
            raise FailedTaskError
        assert get_workers() == 3
    assert get_workers() == default
    with set_workers(1000):
        assert get_workers() == 4


def test_set_workers_belongs_to_its_thread_and_context():
    inside, end, seen = threading.Event(), threading.Event(), []

    def other():
        with set_workers(1):
            inside.set()
            assert end.wait(WAIT_S)
            seen.append(get_workers())

    with set_workers(3):
        join = in_thread(other)
        assert inside.wait(WAIT_S)
        assert get_workers() == 3
        copied = contextvars.copy_context()
        assert in_thread(lambda: copied.run(get_workers))() == 3
        assert contextvars.Context().run(get_workers) == 2
    end.set()
    join()
    assert seen == [1]
    assert copied.run(get_workers) == 3
    assert get_workers() == 2


class Index:
    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


@pytest.mark.parametrize(
    ("workers", "expected"),
    [(1, 1), (3, 3), (4, 4), (5, 4), (10**30, 4), (-1, 4), (-4, 1), (np.int8(2), 2), (np.array(2), 2), (Index(-2), 3)],
)
def test_workers_are_resolved(workers, expected):
    assert resolve_workers(workers, "conv3d") == expected
    with set_workers(workers):
        assert get_workers() == expected


RANGE = r"out of range: it must be at least 1, or -4 to -1 to count from the end of the 4 cores this process may use"


@pytest.mark.parametrize(
    ("workers", "error", "text"),
    [
        (0, ValueError, rf"workers=0 is {RANGE} \(affinity and cgroup quota\)$"),
        (-5, ValueError, rf"workers=-5 is {RANGE}"),
        (Index(-6), ValueError, rf"workers=-6 is {RANGE}"),
        (2.0, TypeError, r"workers must be an integer or None, got 2\.0 \(float\)$"),
        ("2", TypeError, r"workers must be an integer or None, got '2' \(str\)$"),
        (True, TypeError, r"workers must be an integer or None, got True \(bool\)$"),
        (np.False_, TypeError, r"workers must be an integer or None, got .*False.* \(bool\w*\)$"),
        ([2], TypeError, r"workers must be an integer or None, got \[2\] \(list\)$"),
        (np.array([1, 2]), TypeError, r"workers must be an integer or None, got array\(\[1, 2\]\) \(ndarray\)$"),
    ],
)
def test_wrong_workers_are_refused(workers, error, text):
    with pytest.raises(error, match=f"^conv3d: {text}"):
        resolve_workers(workers, "conv3d")
    with pytest.raises(error, match=f"^set_workers: {text.replace(' or None', '')}"), set_workers(workers):
        pytest.fail("the block must not run")
    assert get_workers() == 2


def test_set_workers_takes_no_none():
    with pytest.raises(TypeError, match=r"^set_workers: workers must be an integer, got None \(NoneType\)$"):
        set_workers(None).__enter__()


def test_describe_can_be_written_as_json():
    facts = json.loads(json.dumps(threads.describe()))
    assert facts["workers"] == 2
    assert 1 <= facts["pool_threads"] <= 4
    assert len(facts["held"]) >= len(LIBRARIES)
    assert {pool["problem"] for pool in facts["held"]} == {""}
    assert {pool["threads"] for pool in facts["held"]} == {2}
    assert facts["limit"] == "one BLAS thread while a call runs"


def test_describe_says_what_cannot_be_held(loaded):
    loaded(FakeLibrary(7, stuck=True))
    assert threads.describe()["held"] == [
        {"library": "libfake.so.3", "threads": 7, "problem": "libfake.so.3 stays at 7 after it was set to 1"}
    ]


@contextlib.contextmanager
def interrupted_at(step, *functions):
    """Raise KeyboardInterrupt before the bytecode number `step` of all that the calling thread runs in `functions`."""
    codes, left = {function.__code__ for function in functions}, itertools.count(step, -1)

    def trace(frame, event, argument):
        if frame.f_code not in codes:
            return None
        frame.f_trace = trace  # Python 3.13 looks for it when f_trace_opcodes is set
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and next(left) == 0:
            raise KeyboardInterrupt
        return trace

    before, here = sys.gettrace(), sys._getframe()
    here.f_trace_opcodes = True  # Python 3.12 looks for it when tracing is set
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


CALLERS = (run, threads._held, threads._drive, threads._Call.__init__, threads._Pool.submit, threads._Pool._grow)


@pytest.mark.parametrize("fresh_pool", [False, True])
@pytest.mark.parametrize("limit_blas", [False, True])
def test_an_interrupt_before_any_bytecode_of_the_caller(limit_blas, fresh_pool, monkeypatch):
    active, pause = set(), threading.Event()

    def task(index, slot):
        active.add(index)
        pause.wait(0.001)
        active.discard(index)

    for step in itertools.count():
        if fresh_pool and step % 10 == 0:
            monkeypatch.setattr(threads, "_pool", threads._Pool())
        try:
            with interrupted_at(step, *CALLERS):
                run(task, 3, 2, limit_blas=limit_blas)
        except KeyboardInterrupt:
            assert active == set()
            assert (numbers(), threads._limit.calls) == ({2}, 0)
        else:
            break
    assert step > 100
    done = []
    run(lambda index, slot: done.append(index), 20, 4)
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("convert", [arrays.converted, lambda array, dtype: is_finite(array)])
def test_an_interrupt_leaves_what_numpy_does_about_errors(convert):
    """Where the calling thread computes, floating point errors are ignored, before and after any bytecode."""
    before = np.geterr()
    quiet = arrays._required, is_finite
    for step in itertools.count():
        try:
            with interrupted_at(step, convert, *quiet, *(function.__wrapped__ for function in quiet)):
                convert(np.ones(3, np.float32), np.dtype(float))
        except KeyboardInterrupt:
            assert np.geterr() == before
        else:
            break
    assert step > 20


def test_a_second_interrupt_before_any_bytecode_of_the_wait(monkeypatch):
    settle, active, pause, waited_for = threads._settle, set(), threading.Event(), set()

    class First(KeyboardInterrupt):
        pass

    class InterruptedLock:
        """What the caller waits on: its first wait is interrupted."""

        def __init__(self, lock):
            self.acquire, self.release = self.interrupted, lock.release
            self.lock = lock

        def interrupted(self):
            self.acquire = self.lock.acquire
            raise First

    class Call(threads._Call):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.done = InterruptedLock(self.done)

    def settle_interrupted(call):
        if call in waited_for:
            return settle(call)
        waited_for.add(call)
        with interrupted_at(len(waited_for) - 1, settle):
            return settle(call)

    def task(index, slot):
        active.add(index)
        pause.wait(0.002)
        active.discard(index)

    monkeypatch.setattr(threads, "_Call", Call)
    monkeypatch.setattr(threads, "_settle", settle_interrupted)
    for _ in range(60):  # more than _settle() has bytecodes
        with pytest.raises(KeyboardInterrupt):
            run(task, 1000, 2)
        assert active == set()
        assert (numbers(), threads._limit.calls) == ({2}, 0)
    monkeypatch.undo()
    run(nothing, 4, 4)


def test_slots_of_overlapping_calls_are_unique_within_each():
    def call():
        busy, clashes = set(), []

        def task(index, slot):
            clashes.extend([slot] if slot in busy else [])
            busy.add(slot)
            threading.Event().wait(0.001)
            busy.discard(slot)

        run(task, 60, 3)
        return clashes

    joins = [in_thread(call) for _ in range(6)]
    assert list(itertools.chain(*(join() for join in joins))) == []
