"""Workers and the BLAS limit where a test needs a process of its own: forks, interrupts, exits, counts of threads."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROLOGUE = """
import faulthandler, os, random, signal, sys, threading, time
import numpy as np
import scipy.linalg.cython_blas, threadpoolctl
from gemmconv import threads
from gemmconv.threads import run

faulthandler.enable()
LIBRARIES = [lib for lib in threadpoolctl.ThreadpoolController().lib_controllers if lib.user_api == "blas"]
MATRIX = np.arange(81.0 * 81).reshape(81, 81) % 7
PRODUCT = MATRIX @ MATRIX

def numbers():
    return {library.num_threads for library in LIBRARIES}

def multiply(index, slot):
    assert numbers() == {1}, numbers()
    assert np.array_equal(MATRIX @ MATRIX, PRODUCT)

for library in LIBRARIES:
    library.set_num_threads(2)
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)
"""


def python(code, timeout=50):
    """What a new interpreter prints that runs the code; it has to exit with 0 and without a word on stderr."""
    root = str(Path(__file__).resolve().parent.parent)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    filters = ["-W", "error::RuntimeWarning", "-W", "ignore::DeprecationWarning"]  # the latter: fork, Python >= 3.12
    command = [sys.executable, *filters, "-c", PROLOGUE + textwrap.dedent(code)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0 or done.stderr:
        pytest.fail(f"exit code {done.returncode}:\n{done.stderr}", pytrace=False)
    return done.stdout


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has neither fork nor pthread_kill")


@posix
def test_a_child_forked_while_other_threads_compute_works():
    # Four cores are pretended so that several calls are always in flight.
    out = python("""
        threads.usable_cores = lambda: 4
        stop = threading.Event()

        def compute():
            while not stop.is_set():
                run(multiply, random.randint(1, 4), random.randint(1, 4))

        computing = [threading.Thread(target=compute, daemon=True) for _ in range(4)]
        for thread in computing:
            thread.start()

        def child():
            assert numbers() == {2}, ("restored", numbers())
            assert threads._limit.calls == 0
            assert threads._pool.size == 0
            assert threads.get_workers() == 2
            done = []
            run(lambda index, slot: (multiply(index, slot), done.append(index)), 20, 3)
            assert sorted(done) == list(range(20)), done
            assert numbers() == {2}, ("after", numbers())
            with threadpoolctl.threadpool_limits(3):
                assert numbers() == {3}, "nobody owns the limit"
            grandchild = os.fork()
            if not grandchild:
                run(multiply, 2, 2)
                os._exit(0)
            assert os.waitpid(grandchild, 0)[1] == 0

        held = 0
        for _ in range(40):
            time.sleep(random.random() * 0.003)
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    child()
                    status = 0
                finally:
                    if status:
                        sys.excepthook(*sys.exc_info())
                    os._exit(status)
            end = time.monotonic() + 20
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                held += threads._limit.calls > 0
                assert time.monotonic() < end or os.kill(pid, signal.SIGABRT), "the child hangs"
                time.sleep(0.001)
        stop.set()
        for thread in computing:
            thread.join()
        assert numbers() == {2}
        run(multiply, 20, 4)
        print("computing:", held > 0)
    """)
    assert out == "computing: True\n"


@posix
def test_a_thousand_interrupts_of_the_main_thread():
    # The handler raises only inside of run(), so that this code itself is never cut off. Some calls get several
    # interrupts: those after the first one hit the wait for the workers.
    out = python("""
        asked, ready = threading.Semaphore(0), threading.Semaphore(0)
        main = threading.main_thread().ident
        state = {"active": 0, "late": 0, "over": True, "wrong": 0, "hits": 0}
        lock = threading.Lock()

        def interrupted(signum, frame):
            while frame is not None:
                if frame.f_code is run.__code__:
                    state["hits"] += 1
                    raise KeyboardInterrupt
                frame = frame.f_back

        signal.signal(signal.SIGINT, interrupted)

        def interrupt():
            rng = random.Random(1)
            while True:
                asked.acquire()
                few = rng.choice([1, 1, 2, 5])
                while few > 0 or not state["over"]:  # to the end of a call without end: the few may have come too early
                    time.sleep(rng.random() * rng.choice([0, 1e-5, 1e-4, 3e-4]) if few > 0 else 0.005)
                    signal.pthread_kill(main, signal.SIGINT)
                    few -= 1
                ready.release()

        threading.Thread(target=interrupt, daemon=True).start()

        def task(index, slot):
            with lock:
                state["active"] += 1
                state["late"] += state["over"]
            state["wrong"] += numbers() != {1} or not np.array_equal(MATRIX @ MATRIX, PRODUCT)
            with lock:
                state["late"] += state["over"]
                state["active"] -= 1

        rng, raised, end = random.Random(2), 0, time.monotonic() + 30
        while raised < 1000 and time.monotonic() < end:
            if not threads._limit.calls and not rng.randrange(50):
                threads._pool = threads._Pool()  # interrupts while threads are started, too
            state["over"] = False
            asked.release()
            try:
                run(task, rng.choice([1, 3, 30, 10**9]), rng.randint(1, 2))
            except KeyboardInterrupt:
                raised += 1
            state["over"] = True
            assert state["active"] == 0, "a task is running"
            assert numbers() == {2}, numbers()
            assert threads._limit.calls == 0
            ready.acquire()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        done = []
        run(lambda index, slot: (multiply(index, slot), done.append(index)), 50, 2)
        assert sorted(done) == list(range(50))
        assert (state["late"], state["wrong"], state["active"]) == (0, 0, 0), state
        print("interrupted:", raised >= 1000, "again while waiting:", state["hits"] > raised)
    """)
    assert out == "interrupted: True again while waiting: True\n"


@posix
def test_an_interrupt_of_a_call_without_limit_leaves_no_task_running():
    out = python("""
        main, active = threading.main_thread().ident, []
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored

        def task(index, slot):
            active.append(index)
            if index == 5:
                signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.002)
            active.remove(index)

        raised = 0
        for workers in (1, 2):
            for _ in range(10):
                try:
                    run(task, 10**9, workers, limit_blas=False)
                except KeyboardInterrupt:
                    raised += 1
                    if workers == 2:
                        assert active == [], active
                active.clear()
        print(raised)
    """)
    assert out == "20\n"


EXITS = {
    "right after a call": "run(multiply, 4, 2)",
    "while idle": "run(multiply, 4, 2); time.sleep(0.1)",
    "after an error": """
        try:
            run(lambda index, slot: 1 / 0, 4, 2)
        except ZeroDivisionError:
            pass
    """,
    "in a function for exits": "import atexit; run(multiply, 1, 1); atexit.register(run, multiply, 4, 2)",
    "while a daemon thread computes": """
        def compute():
            while True:
                run(multiply, 4, 2)
        threading.Thread(target=compute, daemon=True).start()
        time.sleep(0.05)
    """,
    "while a thread computes": """
        def compute():
            for _ in range(20):
                run(multiply, 4, 2)
        threading.Thread(target=compute).start()
    """,
}


@pytest.mark.parametrize("when", EXITS)
def test_the_interpreter_exits(when):
    assert python(textwrap.dedent(EXITS[when]) + "\nprint('end')") == "end\n"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_threads_are_no_more_than_usable_cores():
    out = python("""
        before = len(os.listdir("/proc/self/task"))

        def calls():
            for _ in range(50):
                run(multiply, 5, 1000)
                run(lambda index, slot: None, 5, 1000, limit_blas=False)

        users = [threading.Thread(target=calls) for _ in range(8)]
        for user in users:
            user.start()
        for user in users:
            user.join()

        def added():
            return len(os.listdir("/proc/self/task")) - before

        end = time.monotonic() + 10  # joined threads may still be on their way out
        while added() > threads.usable_cores() and time.monotonic() < end:
            time.sleep(0.01)
        print(1 <= added() <= threads.usable_cores())
    """)
    assert out == "True\n"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="CPUs of a thread are read in Linux's /proc")
def test_no_other_thread_inherits_the_cpus_of_a_worker():
    # OpenBLAS ends its threads before a fork and starts new ones when their number is set, from a pool thread, that is.
    out = python("""
        meeting, ours = threading.Barrier(2), {}

        def task(index, slot):
            ours.setdefault(threading.get_native_id(), set()).add(frozenset(os.sched_getaffinity(0)))
            meeting.wait(20)

        def nothing():
            pass

        def fork(child=nothing):
            pid = os.fork()
            if not pid:
                child()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0

        def others():
            tasks = {int(task) for task in os.listdir("/proc/self/task")} - set(ours) - {os.getpid()}
            assert tasks, "BLAS has no threads"
            return {frozenset(os.sched_getaffinity(task)) for task in tasks}

        threads.usable_cores = lambda: 2
        all_cpus = {frozenset(os.sched_getaffinity(0))}
        run(task, 2, 2)
        assert others() == all_cpus
        fork()
        run(task, 2, 2)
        assert others() == all_cpus
        run(lambda index, slot: fork(), 1, 1)
        assert others() == all_cpus
        run(lambda index, slot: (task(index, slot), fork() if index else None), 2, 2)
        assert others() == all_cpus
        assert {frozenset(os.sched_getaffinity(0))} == all_cpus
        assert [len(cpus) for cpus in ours.values()] == [1, 1], "a worker has its own again"

        def child():
            ours.clear()
            run(task, 2, 2)
            assert others() == all_cpus

        fork(child)
        print("end")
    """)
    assert out == "end\n"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_a_signal_handler_may_call():
    out = python("""
        calls = []

        def handler(signum, frame):
            run(multiply, 2, 2)
            calls.append(1)
            signal.setitimer(signal.ITIMER_REAL, random.random() * 0.001 + 1e-6)

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while len(calls) < 100:
            run(multiply, 4, 2)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        assert numbers() == {2}
        print("done")
    """)
    assert out == "done\n"
