"""Calls of each kind, and what the agent must have seen of them.

    matrix.py exec CALLS FILE       the functions are armed at their import
    matrix.py attach CALLS FILE     prints `ready`; the call sites are specialised before the functions are armed

Of the calls of a kind, half are made from call sites that are executed twice only, so that they are never specialised,
and half from one that is hot. FILE gets `{span name: {pid: [attributes of each call]}}`.
"""
import functools
import json
import os
import sys
import threading
import types

import armed
import matrix_target as t

MODE, CALLS, FILE = sys.argv[1], int(sys.argv[2]), sys.argv[3]
NAMES = ["alpha", "beta", "gamma", "d\xe9lta", "\u0435\u043f\u0441", "\U0001d701"]
thing = t.Thing("the thing")
derived = t.Derived("derived")
seen = {}


class Expect:
    """Notes a call that is made."""

    def __init__(self, pid):
        self.pid = pid

    def __call__(self, span, **attributes):
        known = seen.setdefault(span, {}).setdefault(self.pid, [])
        known.append({name: value for name, value in attributes.items() if value is not None})


def ignore(span, **attributes):
    pass


def exact(numbers, expect):
    for i in numbers:
        t.exact(i, NAMES[i % 6])
        expect("exact", a=i, b=NAMES[i % 6], r=NAMES[i % 6])


def defaults(numbers, expect):
    for i in numbers:
        t.defaults(i)
        expect("defaults", a=i)


def some_defaults(numbers, expect):
    for i in numbers:
        t.defaults(i, True)
        expect("defaults", a=i, b=True)


def keyword(numbers, expect):
    for i in numbers:
        t.keyword(b=NAMES[i % 6], a=i)
        expect("keyword", a=i, b=NAMES[i % 6])


def mixed(numbers, expect):
    for i in numbers:
        t.keyword(i, b=1.5)
        expect("keyword", a=i, b=1.5)


def keyword_only(numbers, expect):
    for i in numbers:
        t.keyword_only(i, b=-i)
        expect("keyword_only", a=i, b=-i)


def star(numbers, expect):
    for i in numbers:
        arguments = (i, "two", -i)
        t.star(*arguments)
        expect("star", a=i, b="two", c=-i)


def star_star(numbers, expect):
    for i in numbers:
        arguments = {"x": i, "y": NAMES[i % 6]}
        t.star_star(**arguments)
        expect("star_star", x=i, y=NAMES[i % 6])


def from_map(numbers, expect):
    for i in map(t.from_map, numbers):
        expect("from_map", a=i)


def sort_key(numbers, expect):
    for i in sorted(numbers, key=t.sort_key):
        expect("sort_key", a=i)


def partial(numbers, expect):
    for i in numbers:
        functools.partial(t.partial, i)("behind")
        expect("partial", a=i, b="behind")


def recurse(numbers, expect):
    for i in numbers:
        if i % 10 == 0:
            t.recurse(9)
            for n in range(10):
                expect("recurse", n=n)


def threaded(numbers, expect):
    def work(mine):
        for i in mine:
            t.threaded(i)

    threads = [threading.Thread(target=work, args=(numbers[part::4],)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in numbers:
        expect("threaded", a=i)


def thread_target(numbers, expect):
    for i in numbers:
        if i % 4 == 0:
            thread = threading.Thread(target=t.thread_target, args=(i,), kwargs={"b": "kw"})
            thread.start()
            thread.join()
            expect("thread_target", a=i, b="kw")


def generator(numbers, expect):
    for i in numbers:
        for _ in t.generator(i):
            pass
        expect("generator", a=i)


def coroutine(numbers, expect):
    for i in numbers:
        try:
            t.coroutine(i).send(None)
        except StopIteration:
            expect("coroutine", a=i)


def raises(numbers, expect):
    for i in numbers:
        try:
            t.raises(i)
        except ValueError:
            expect("raises", a=i, m="no %d" % i)


def method(numbers, expect):
    for i in numbers:
        thing.method(i)
        expect("Thing.method", a=i, of="the thing")


def derived_method(numbers, expect):
    for i in numbers:
        derived.method(i)
        expect("Derived.method", a=i, of="derived")
        expect("Thing.method", a=i, of="derived")


def bound(numbers, expect):
    method = thing.bound
    for i in numbers:
        method(i)
        expect("Thing.bound", a=i, of="the thing")


def class_method(numbers, expect):
    for i in numbers:
        t.Derived.class_method(i)
        expect("Thing.class_method", a=i)


def static_method(numbers, expect):
    for i in numbers:
        thing.static_method(i)
        expect("Thing.static_method", a=i)


def getter(numbers, expect):
    for i in numbers:
        thing.getter
        expect("Thing.getter", of="the thing", r="the thing")


def getitem(numbers, expect):
    for i in numbers:
        thing[i]
        expect("Thing.__getitem__", a=i, of="the thing")


def call(numbers, expect):
    for i in numbers:
        thing(i)
        expect("Thing.__call__", a=i, of="the thing")


def made(numbers, expect):
    for i in numbers:
        t.Made(i)
        expect("Made.__init__", a=i)


def forked(numbers, expect):
    for i in numbers:
        t.forked(i)
        expect("forked", a=i)


def fresh(function):
    """The same function with a code object of its own, which is not specialised."""
    code = function.__code__
    return types.FunctionType(code.replace(co_firstlineno=code.co_firstlineno), function.__globals__)


def run(kind, expect):
    half = CALLS // 2
    for i in range(0, half, 2):
        fresh(kind)(range(i, i + 2), expect)
    kind(range(half, half + half), expect)


KINDS = [
    exact, defaults, some_defaults, keyword, mixed, keyword_only, star, star_star, from_map, sort_key, partial, recurse,
    threaded, thread_target, generator, coroutine, raises, method, derived_method, bound, class_method, static_method,
    getter, getitem, call, made,
]
ARMED = [
    t.exact, t.defaults, t.keyword, t.keyword_only, t.star, t.star_star, t.from_map, t.sort_key, t.partial, t.recurse,
    t.threaded, t.thread_target, t.forked, t.raises, t.Thing.method, t.Thing.bound,
    t.Thing.class_method.__func__, t.Thing.static_method, t.Thing.getter.fget, t.Thing.__getitem__, t.Thing.__call__,
    t.Derived.method, t.Made.__init__,
]

if MODE == "attach":
    for kind in KINDS + [forked]:
        kind(range(CALLS), ignore)
    print("ready", flush=True)
    armed.wait_until_armed(*ARMED)
for kind in KINDS:
    run(kind, Expect(os.getpid()))


def note_forked(numbers, expect):
    for i in numbers:
        expect("forked", a=i)


# Half as many in a child, and then all of them in a child of the child.
child = os.fork()
if child == 0:
    forked(range(CALLS // 2), ignore)
    grandchild = os.fork()
    if grandchild == 0:
        run(forked, ignore)
        os._exit(0)
    assert os.waitpid(grandchild, 0)[1] == 0
    with open(FILE, "w") as file:
        file.write(str(grandchild))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
note_forked(range(CALLS // 2), Expect(child))
with open(FILE) as file:
    run(note_forked, Expect(int(file.read())))

with open(FILE, "w") as file:
    json.dump(seen, file)
print("done", sum(len(calls) for pids in seen.values() for calls in pids.values()))
