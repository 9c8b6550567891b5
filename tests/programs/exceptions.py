"""Exceptions of every shape, each leaving a watched function, and coming into watched ones.

    exceptions.py FILE FOLDER   FILE gets {case: {type, message, trace}}: what Python itself says; FOLDER is for modules

`message` is null where only code of the program knows it.
"""
import functools
import importlib.util
import json
import linecache
import os
import sys
import threading
import traceback

import exceptions_target as t

# Python prints source lines where it finds them: here nowhere.
linecache.getline = lambda *args, **kwargs: ""
linecache.getlines = lambda *args, **kwargs: []

expected = {}
cases = []


def case(function):
    cases.append((function.__name__, function))
    return function


def note(name, e, tb):
    module = type(e).__module__
    own = type(e).__qualname__
    expected[name] = {
        "type": own if module in ("builtins", "__main__") else module + "." + own,
        "message": None if getattr(e, "unknown", False) else str(e),
        "trace": "".join(traceback.format_exception(type(e), e, tb)),
    }


def catch(name, function):
    try:
        t.run(name, function)
    except BaseException as e:
        # The first frame is this function's.
        note(name, e, e.__traceback__.tb_next)
    else:
        raise AssertionError(name + " did not raise")


class Noted:
    """Notes the exception that leaves a block, as the blocks around it get it."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        pass

    def __exit__(self, kind, e, tb):
        note(self.name, e, tb)


def leaves(block, name, function):
    try:
        with block(name), Noted(name):
            function()
    except BaseException:
        pass


def handled(name, function):
    def body():
        try:
            function()
        except BaseException as e:
            note(name, e, e.__traceback__)
            t.Handler().handle(e, None)
    t.node(name, body)


def attempted(name, function):
    def body():
        try:
            t.attempt(function)
        except BaseException as e:
            note(name, e, e.__traceback__.tb_next)
    t.node(name, body)


class Custom(Exception):
    class Inner(ValueError):
        pass


class OwnText(Exception):
    unknown = True

    def __str__(self):
        return "this needs code"


class Text(str):
    pass


def deeper(n):
    if n == 0:
        raise ValueError("at the bottom")
    return deeper(n - 1)


def even(n):
    return odd(n - 1) if n else 1 // 0


def odd(n):
    return even(n - 1) if n else 1 // 0


@case
def nested_calls():
    def inner():
        return int("no number")
    inner()


@case
def chained_by_cause():
    try:
        {}["missing"]
    except KeyError as e:
        raise Custom("with a cause") from e


@case
def chained_by_context():
    try:
        1 // 0
    except ZeroDivisionError:
        [][5]


@case
def suppressed():
    try:
        1 // 0
    except ZeroDivisionError:
        raise Custom("alone") from None


@case
def long_chain():
    try:
        try:
            try:
                deeper(2)
            except ValueError as e:
                raise KeyError("second") from e
        except KeyError:
            raise TypeError("third")
    except TypeError as e:
        raise OSError("fourth") from e


@case
def multi_line_call():
    return max(
        1,
        2,
        int(
            "no number"
        ),
    )


@case
def multi_line_expression():
    values = {"a": 1}
    return (values["a"]
            + values["a"]
            + values["b"])


@case
def in_a_library():
    json.loads("{ no json")


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper


@case
@decorated
@decorated
def behind_decorators():
    raise Custom("decorated")


@case
def in_a_lambda():
    (lambda: (lambda x: 1 // x)(0))()


@case
def in_a_comprehension():
    return [1 // x for x in [2, 1, 0]]


@case
def in_a_generator():
    return list(1 // x for x in [1, 0])


@case
def in_a_class_body():
    class Body:
        value = 1 // 0


@case
def recursion():
    deeper(20)


@case
def recursion_little():
    deeper(3)


@case
def recursion_of_two():
    even(21)


@case
def far_jumps():
    far.function(0)


@case
def far_jumps_back():
    far.function(1)


@case
def raised_again():
    try:
        deeper(1)
    except ValueError as e:
        error = e
    raise error


@case
def in_finally():
    try:
        1 // 0
    finally:
        {}["in finally"]


@case
def in_with():
    with open(os.devnull) as file:
        file.write("not open for writing")


@case
def assertion():
    assert 1 == 2, ["a", 'b"', 3.5, None, (1,), {"k": b"\xff"}]


for number, error in enumerate([
    ValueError(), ValueError(""), ValueError("one"), ValueError("one", 2, 3.0, None, True), ValueError(("a", "tuple")), ValueError(5), ValueError(None),
    ValueError("lines\nof\ntext"), ValueError("\u20ac \u0434\u0430 \U0001f40d"), ValueError(Text("str subclass")), ValueError(1e20, -0.0, 2**40, -7),
    KeyError("it's"), KeyError(("a", 1)), KeyError(), KeyError("a", "b"), KeyError(7), Custom(), Custom.Inner("qualified"), OwnText("arguments"),
    OSError("text"), OSError(2, "No such file"), OSError(2, "No such file", "/a/file"), OSError(2, "Cross", "/a", None, "/b"), FileNotFoundError(),
    ImportError("no module", name="x"), ImportError(), ModuleNotFoundError("No module named 'x'", name="x"), MemoryError(), RecursionError("deep"),
    SystemExit(3), SystemExit("text"), KeyboardInterrupt(), ValueError(ValueError("inner")), ValueError([ValueError("inner"), KeyError(1, 2)]), ValueError(int, Custom),
    SyntaxError("bad"), SyntaxError("bad", ("file.py", 3, None, None)), StopIteration,
]):
    if error is StopIteration:
        continue

    def raises(error=error):
        raise error.with_traceback(None)
    cases.append(("error %d: %r" % (number, error), raises))


@case
def decoding():
    b"abc\xff".decode()


@case
def decoding_more():
    b"\xe2\x82".decode("utf-8")


@case
def encoding():
    "a\u20acb".encode("latin-1")


@case
def no_file():
    open("/nonexistent/file")


if sys.version_info >= (3, 11):
    @case
    def notes():
        error = ValueError("with notes")
        error.add_note("a note")
        error.add_note("two\nlines")
        raise error.with_traceback(None)

    @case
    def group():
        errors = []
        for n in range(3):
            try:
                deeper(n)
            except ValueError as e:
                errors.append(e)
        errors.append(ExceptionGroup("inner", [KeyError("k"), TypeError("t")]))
        errors[0].add_note("noted")
        try:
            1 // 0
        except ZeroDivisionError:
            raise ExceptionGroup("outer", errors)

    @case
    def wide_group():
        raise ExceptionGroup("wide", [ValueError(n) for n in range(20)])

source = ["def function(kind):"]
source += ["    x = %d" % n for n in range(100)] + [""] * 1000 + ["    if kind:", "        for i in range(3):"]
source += ["            x += (i +" + "\n" * 300 + "                  i)"]
source += ["            if i == 2: x = 1 // 0"] + [""] * 70000 + ["    return 1 // 0"]
path = os.path.join(sys.argv[2], "far.py")
with open(path, "w") as file:
    file.write("\n".join(source) + "\n")
spec = importlib.util.spec_from_file_location("far", path)
far = importlib.util.module_from_spec(spec)
spec.loader.exec_module(far)

for _ in range(3):
    for name, function in cases:
        # Each in a thread of its own: how long one may wait for its exceptions to be read is bounded.
        for target, args in [
            (catch, (name, function)),
            (leaves, (t.block, "block: " + name, function)),
            (leaves, (t.Phase, "phase: " + name, function)),
            (handled, ("handled: " + name, function)),
            (attempted, ("attempted: " + name, function)),
        ]:
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()


for error in [StopIteration(1), GeneratorExit(), StopAsyncIteration(), SystemExit(), SystemExit(0), SystemExit(None)]:
    try:
        t.ends_normally(error)
    except BaseException:
        pass
for number in range(3000):
    try:
        t.raise_often(number)
    except ValueError:
        pass
with open(sys.argv[1], "w") as file:
    json.dump(expected, file)
