"""What Python programs do, inside armed functions. The output does not depend on time or on ids."""
import asyncio
import faulthandler
import functools
import gc
import importlib
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref

import unharmed_target as t


def exceptions():
    def fail(n):
        if n == 0:
            raise KeyError("deep")
        try:
            return t.outer(fail, n - 1)
        finally:
            t.quick(n)

    try:
        t.around(fail, 5)
    except KeyError:
        print(traceback.format_exc())
    for exception in [ValueError("x"), SystemExit(3), KeyboardInterrupt(), StopIteration(4), GeneratorExit()]:
        try:
            t.around(t.raising, exception)
        except BaseException as caught:
            print(repr(caught), caught is exception, sys.exc_info()[1] is exception)
    try:
        try:
            t.raising(ValueError("first"))
        except ValueError as first:
            t.raising(TypeError("second"))
    except TypeError as second:
        print(repr(second.__context__))
    try:
        t.around(int, "no number")
    except ValueError as error:
        print(error)
    print(list(t.around(map, t.quick, [1, 2])), sys.exc_info())


def fork():
    def child(code):
        pid = os.fork()
        if pid == 0:
            # Returns from the armed functions in the child, too.
            return None
        return os.WEXITSTATUS(os.waitpid(pid, 0)[1])

    for code in range(5):
        status = t.outer(child, code)
        if status is None:
            t.quick(code)
            os._exit(code + t.recurse(3))
        print("child ended with", status)


def processes():
    out = t.around(functools.partial(subprocess.run, stdout=subprocess.PIPE), [sys.executable, "-c", "print(6 * 7)"])
    print(out.stdout, out.returncode)
    out = t.around(functools.partial(subprocess.run, stdout=subprocess.PIPE, preexec_fn=lambda: t.quick(1)), ["echo", "x"])
    print(out.stdout, out.returncode)
    print(t.around(os.system, "exit 3") >> 8)


def signals():
    hits = []

    def handler(number, frame):
        hits.append(t.quick(len(hits)))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        t.outer(t.recurse, 20)
    t.around(time.sleep, 0.02)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(len(hits) > 10)

    def leave(number, frame):
        raise TimeoutError("left")

    signal.signal(signal.SIGALRM, leave)
    for _ in range(20):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            t.outer(time.sleep, 5)
        except TimeoutError as error:
            t.quick(1)
    print("left", error_free(t.quick, 1))
    signal.signal(signal.SIGUSR1, lambda number, frame: t.outer(print, "signal", number == signal.SIGUSR1))
    t.outer(os.kill, os.getpid(), signal.SIGUSR1)


def error_free(function, *args):
    return function(*args)


def coroutines():
    async def worker(n):
        total = 0
        for i in range(5):
            await asyncio.sleep(0)
            total += await t.later(t.quick(n))
        return total

    async def endless():
        try:
            while True:
                await asyncio.sleep(0.001)
                t.quick(1)
        finally:
            print("cancelled")

    async def numbers(n):
        for i in t.numbers(n):
            yield t.around(str, i)
            await asyncio.sleep(0)

    async def main():
        print(await asyncio.gather(*[worker(n) for n in range(10)]))
        task = asyncio.ensure_future(endless())
        await asyncio.sleep(0.02)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            print("was cancelled")
        print([x async for x in numbers(3)])
        loop = asyncio.get_running_loop()
        print(await loop.run_in_executor(None, t.quick, 1))

    t.outer(asyncio.run, main())


def generators():
    def inside(n):
        for i in t.numbers(n):
            received = yield t.around(t.quick, i)
            if received:
                t.around(print, "received", received)

    generator = t.around(inside, 5)
    print(t.around(next, generator), t.outer(generator.send, "hello"), list(generator))
    suspended = inside(5)
    t.around(next, suspended)
    t.around(suspended.close)
    thrown = inside(5)
    next(thrown)
    try:
        t.around(thrown.throw, ValueError("thrown"))
    except ValueError as error:
        print(error)
    print(sum(t.numbers(100)), sorted(t.around(list, t.numbers(3)), key=t.quick))


def many_threads():
    results = []
    lock = threading.Lock()

    def work(n):
        for i in range(200):
            value = t.outer(t.recurse, 5)
        with lock:
            results.append(value + n)

    threads = [threading.Thread(target=functools.partial(t.around, work, n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sorted(results))


def frames():
    def names():
        return [(frame.function, frame.lineno) for frame in inspect.stack(0)][:6]

    print(t.outer(names))
    events = []

    def profile(frame, event, arg):
        events.append((event, frame.f_code.co_name))

    sys.setprofile(profile)
    t.outer(t.recurse, 3)
    sys.setprofile(None)
    print(events)
    lines = []

    def trace(frame, event, arg):
        lines.append((event, frame.f_code.co_name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    t.around(t.quick, 3)
    sys.settrace(None)
    print(lines)
    print(t.quick.__name__, t.quick.__code__.co_varnames, inspect.signature(t.outer), callable(t.quick))


def changes():
    """What a program may do to its functions."""
    original = t.quick.__code__
    t.quick.__code__ = (lambda n: n + 100).__code__
    print(t.quick(1), [t.quick(i) for i in range(3)])
    t.quick.__code__ = original
    print(t.quick(1))
    t.quick.__defaults__ = (41,)
    print([t.quick() for _ in range(20)][-1])
    t.quick.__defaults__ = None
    t.quick.note = "note"
    copy = types.FunctionType(t.quick.__code__, t.quick.__globals__, "copy")
    print(copy(1), t.quick.note, pickle.loads(pickle.dumps(t.quick)) is t.quick)
    bound = types.MethodType(t.quick, 5)
    print(bound())
    weak = weakref.ref(t.odd)
    t.odd = lambda n: "patched"
    gc.collect()
    print(weak() is None, t.even(5))
    importlib.reload(t)
    print(t.odd(5), t.quick(2), t.recurse(5))
    for _ in range(50):
        del sys.modules["unharmed_target"]
        module = importlib.import_module("unharmed_target")
        module.quick(1)
    print(module.recurse(7), module is t)


def dumps():
    with tempfile.TemporaryFile("w+") as file:
        t.outer(faulthandler.dump_traceback, file, False)
        file.seek(0)
        print("".join(line for line in file if "unharmed_target" in line).replace(os.path.dirname(__file__), ""))


sections = [exceptions, fork, processes, signals, coroutines, generators, many_threads, frames, dumps, changes]
for section in sections:
    print("--", section.__name__, flush=True)
    section()
    sys.stdout.flush()
print("-- exec", flush=True)
t.outer(os.execv, sys.executable, [sys.executable, "-c", "print('after exec'); raise SystemExit(9)"])
