"""Values of every type in every place that a path can lead to.

    capture.py FILE     FILE gets {function: {case: {attribute: value}}}: what must be captured

A value that is `OPTIONAL(x)` may be x or absent; None is absent; `CUT(x)` is a beginning of x; `PART(x)` is x, marked as
not being all of it.
"""
import collections
import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import sys
import typing
import uuid

import capture_target as t

expected = {}
calls = []


class OPTIONAL:
    def __init__(self, value):
        self.value = value


class CUT:
    def __init__(self, value):
        self.value = value


class PART:
    def __init__(self, value):
        self.value = value


def case(function, name, x, **values):
    """One call, and what is captured of it."""
    assert name not in expected.setdefault(function.__name__, {}), name
    expected[function.__name__][name] = {
        key: {"optional": value.value} if isinstance(value, OPTIONAL)
        else {"cut": value.value} if isinstance(value, CUT)
        else {"part": value.value} if isinstance(value, PART)
        else {"exactly": value}
        for key, value in values.items()
    }
    calls.append((function, name, x))


# Values.

class Text(str):
    pass


class TextWithAttributes(str):
    def __new__(cls, text):
        self = super().__new__(cls, text)
        self.note = "note"
        return self


class Count(int):
    pass


class Ratio(float):
    pass


class Plain(enum.Enum):
    TEXT = "plain text"
    NUMBER = 12
    FLOAT = 0.25
    NOTHING = None
    WIDE = "\u0435\u043d\u0443\u043c"
    PAIR = (1, 2)


class Mixed(str, enum.Enum):
    SUCCESS = "success"
    ALIAS = "success"
    WIDE = "\u0443\u0441\u043f\u0435\u0445"


class Number(enum.IntEnum):
    SEVEN = 7
    NEGATIVE = -7


class Bits(enum.IntFlag):
    ONE = 1
    TWO = 2


for name, text in {
    "empty": "", "one character": "x", "ascii": "a plain str", "latin-1": "d\xe9j\xe0 vu", "one latin-1": "\xe9",
    "ucs-2": "\u0434\u0430 \u20ac", "ucs-4": "\U0001f40d snake \u20ac \xe9 e", "nul": "a\0b", "lines": "a\n\tb\r",
    "joined": "-".join(["joined", "at", "run", "time"]), "200 ascii": "z" * 200,
}.items():
    case(t.value, "str " + name, text, v=text)
    case(t.value, "str subclass " + name, Text(text), v=text)
    case(t.keyword, "str " + name, text, v=text)
    case(t.either, "str " + name, text, v=text)
# What is read with a str's header, and what is not.
for length in range(130):
    text = "".join(chr(97 + (3 * index + length) % 26) for index in range(length))
    case(t.value, "str of %d letters" % length, text, v=text)
    wide = text.upper()[:100] + "\u20ac"
    case(t.value, "str of %d letters, ucs-2" % length, wide, v=wide)
case(t.value, "str subclass with attributes", TextWithAttributes("text"), v="text")
case(t.value, "str too long", "0123456789" * 500, v=CUT("0123456789" * 500))
case(t.value, "str latin-1 too long", "\xe9" * 5000, v=CUT("\xe9" * 5000))
case(t.value, "str ucs-2 too long", "\u20ac" * 5000, v=CUT("\u20ac" * 5000))
case(t.value, "str ucs-4 too long", "\U0001f40d" * 5000, v=CUT("\U0001f40d" * 5000))
for number in [
    0, 1, -1, 7, 256, -256, 257, 2**15, 2**30 - 1, 2**30, -(2**30), 2**30 + 1, 2**31, -(2**31), 2**32 + 5, 2**45 + 9,
    2**60 - 1, 2**60, 2**60 + 3, -(2**60), 2**62 + 1, 2**63 - 1, -(2**63) + 1,
]:
    case(t.value, "int %d" % number, number, v=number)
    case(t.value, "int subclass %d" % number, Count(number), v=number)
case(t.value, "int -2**63", -(2**63), v=OPTIONAL(-(2**63)))
for n, number in enumerate([2**63, 2**64, -(2**63) - 1, 2**64 + 1, 10**30, -(10**30), 2**91, 2**1000]):
    case(t.value, "int too large, %d" % n, number, v=None)
for number in [0.0, 1.0, -1.5, 3.141592653589793, 1e300, -1e-300, 5e-324]:
    case(t.value, "float %r" % number, number, v=number)
case(t.value, "float subclass", Ratio(2.5), v=2.5)
case(t.value, "True", True, v=True)
case(t.value, "False", False, v=False)
case(t.value, "None", None, v=None)
case(t.value, "enum str", Plain.TEXT, v="plain text")
case(t.value, "enum int", Plain.NUMBER, v=12)
case(t.value, "enum float", Plain.FLOAT, v=0.25)
case(t.value, "enum None", Plain.NOTHING, v=None)
case(t.value, "enum ucs-2", Plain.WIDE, v="\u0435\u043d\u0443\u043c")
case(t.value, "enum tuple", Plain.PAIR, v=None)
case(t.value, "enum str mix-in", Mixed.SUCCESS, v="success")
case(t.value, "enum str mix-in alias", Mixed.ALIAS, v="success")
case(t.value, "enum str mix-in ucs-2", Mixed.WIDE, v="\u0443\u0441\u043f\u0435\u0445")
case(t.value, "IntEnum", Number.SEVEN, v=7)
case(t.value, "IntEnum negative", Number.NEGATIVE, v=-7)
case(t.value, "IntFlag", Bits.ONE | Bits.TWO, v=3)
for name, text in {"ascii": "select 1 -- " * 300, "ucs-2": "\u20ac" * 2000}.items():
    case(t.long_text, "long " + name, text, v=text)
    case(t.long_text, "too long " + name, text * 3, v=CUT(text * 3))

# Paths, UUIDs, dates: what str gives, whether it was called before or not.
class MyPath(type(pathlib.Path())):
    pass


class MyUUID(uuid.UUID):
    pass


for name, pieces in {
    "empty": (), "dot": (".",), "relative": ("a", "b/c"), "absolute": ("/srv", "data"), "root": ("/",), "two slashes": ("//a", "b"),
    "three slashes": ("///a", "b"), "not normal": ("a//./b/",), "up": ("a", "../b"), "absolute later": ("a", "/b", "c"),
    "ucs-2": ("/\u0434\u0430\u043d\u043d\u044b\u0435", "x.csv"), "many": tuple("abcdefghij"),
}.items():
    for kind in [pathlib.Path, pathlib.PurePosixPath, MyPath]:
        expected_text = str(kind(*pieces))
        case(t.value, "%s %s" % (kind.__name__, name), kind(*pieces), v=expected_text)
        shown = kind(*pieces)
        str(shown)
        case(t.value, "%s %s, shown" % (kind.__name__, name), shown, v=expected_text)
    parent = pathlib.Path("/x/y", *pieces)
    case(t.value, "parent of %s" % name, parent.parent, v=str(pathlib.Path("/x/y", *pieces).parent))
    case(t.value, "child of %s" % name, pathlib.Path(*pieces) / "z" / pathlib.Path("u"), v=str(pathlib.Path(*pieces) / "z" / "u"))
case(t.value, "resolved path", pathlib.Path("/").resolve(), v="/")
case(t.value, "home", pathlib.Path.home(), v=str(pathlib.Path.home()))
case(t.value, "Windows path", pathlib.PureWindowsPath("C:/x", "y"), v=None)
for name, number in {"zero": 0, "one": 1, "large": 2**128 - 1, "some": 0x123456789abcdef00fedcba987654321, "30 bits": 2**90}.items():
    case(t.value, "UUID " + name, uuid.UUID(int=number), v=str(uuid.UUID(int=number)))
    case(t.value, "UUID subclass " + name, MyUUID(int=number), v=str(uuid.UUID(int=number)))
random_id = uuid.uuid4()
case(t.value, "UUID random", random_id, v=str(random_id))
for name, moment in {
    "date": datetime.date(2024, 2, 29), "datetime": datetime.datetime(2024, 2, 29, 23, 5, 9),
    "datetime with micros": datetime.datetime(1, 1, 1, 0, 0, 0, 7), "datetime UTC": datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc),
    "datetime with offset": datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone(-datetime.timedelta(hours=5, minutes=30))),
}.items():
    case(t.value, name, moment, v=str(moment))


class Zone(datetime.tzinfo):
    def utcoffset(self, moment):
        raise AssertionError("the agent must run no code")


case(t.value, "datetime with a zone of code", datetime.datetime(2024, 1, 1, tzinfo=Zone()), v=None)

for name, other in {
    "bytes": b"bytes", "list": [1], "tuple": (1,), "dict": {"v": 1}, "set": {1}, "object": object(), "type": int,
    "function": case, "complex": 1j, "decimal": decimal.Decimal("1.5"), "module": sys, "range": range(3),
}.items():
    case(t.value, "absent " + name, other, v=None)


# Attributes: `first`, `second`, `last`.

class Simple:
    def __init__(self, first, second, last):
        self.first = first
        self.second = second
        self.last = last


class Child(Simple):
    def __init__(self, *values):
        self.mine = "mine"
        super().__init__(*values)


class Backwards:
    def __init__(self, first, second, last):
        self.last = last
        self.second = second
        self.first = first


class Slots:
    __slots__ = ("first", "second", "last")

    def __init__(self, first, second, last):
        self.first, self.second, self.last = first, second, last


class SlotsAndDict(Slots):
    def __init__(self, first, second, last):
        super().__init__(first, second, last)
        self.more = "more"


class ClassAttributes:
    first, second, last = "first", "second", "last"


class Many:
    def __init__(self, first, second, last):
        self.first = first
        for i in range(40):
            setattr(self, "filler_%d" % i, i)
        self.second = second
        for i in range(300):
            setattr(self, "more_%d" % i, str(i))
        self.last = last


class Thirty:
    def __init__(self, first, second, last):
        self.first = first
        for i in range(27):
            setattr(self, "filler_%d" % i, i)
        self.second = second
        self.last = last


class MyDict(dict):
    pass


class MyList(list):
    pass


class MyTuple(tuple):
    pass


class MyInt(int):
    pass


class Error(Exception):
    pass


@dataclasses.dataclass
class Data:
    first: str
    second: int
    last: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    first: str
    second: int
    last: object = None


class Meta(type):
    pass


class WithMeta(metaclass=Meta):
    def __init__(self, first, second, last):
        self.first, self.second, self.last = first, second, last


class Getters:
    def __init__(self):
        self.second = 2

    @property
    def first(self):
        raise AssertionError("the agent must run no code")

    def __getattr__(self, name):
        raise AssertionError("the agent must run no code")


def set_all(x, first="the first", second=-2, last=True):
    x.first, x.second, x.last = first, second, last
    return x


def values_of(x, **changed):
    values = {"first": "the first", "second": -2, "last": True}
    values.update(changed)
    return values


def attributes(name, x, optional=False, **changed):
    values = values_of(x, **changed)
    if optional:
        values = {key: OPTIONAL(value) for key, value in values.items()}
    case(t.attributes, name, x, **values)


for kind in [Simple, Child, Backwards, Many, Thirty, Data, Frozen, WithMeta]:
    attributes(kind.__name__, kind("the first", -2, True))
    for other in range(3):
        attributes("%s, another %d" % (kind.__name__, other), kind("n%d" % other, other, 0.5),
                   first="n%d" % other, second=other, last=0.5)
    materialised = kind("the first", -2, True)
    materialised.__dict__
    attributes(kind.__name__ + ", dict touched", materialised)
    materialised = kind("the first", -2, True)
    vars(materialised)["later"] = 1
    attributes(kind.__name__ + ", dict changed", materialised)
    if kind is not Frozen:
        replaced = kind("old", 0, None)
        replaced.__dict__ = {"last": True, "x": 1, "first": "the first", "second": -2}
        attributes(kind.__name__ + ", dict replaced", replaced)
        deleted = kind("the first", -2, True)
        del deleted.first
        attributes(kind.__name__ + ", first deleted", deleted, first=None)
        again = kind("old", -2, True)
        del again.first
        again.first = "the first"
        attributes(kind.__name__ + ", first deleted and set again", again)
        deleted = kind("the first", -2, True)
        del deleted.second
        attributes(kind.__name__ + ", second deleted", deleted, second=None)
        more = kind("the first", -2, True)
        for i in range(60):
            setattr(more, "added_%d" % i, i)
        attributes(kind.__name__ + ", with more", more)
        touched = kind("old", 0, None)
        touched.__dict__
        attributes(kind.__name__ + ", dict touched, then set", set_all(touched))

for base in [MyDict(), MyList([1, 2]), MyTuple((1, 2, 3)), MyTuple(), MyInt(5), MyInt(2**70), Error(), Error("x", 1),
             Text("text"), Ratio(1.5)]:
    attributes("%s %r" % (type(base).__name__, base), set_all(base))
attributes("Slots", Slots("the first", -2, True))
attributes("Slots and dict", SlotsAndDict("the first", -2, True))


class MoreSlots(Slots):
    __slots__ = ("before", "more")


class Shadowed(Slots):
    first = property(lambda self: 1 / 0)


class Numbers(typing.NamedTuple):
    first: str
    second: int
    last: bool


class Record(Numbers):
    first = "a default of the class"

    def __new__(cls, *values):
        self = super().__new__(cls, *values)
        return self


if sys.version_info >= (3, 10):
    SlottedData = dataclasses.make_dataclass("SlottedData", ["first", "second", "last"], slots=True)
    attributes("dataclass with slots", SlottedData("the first", -2, True))
attributes("inherited slots", MoreSlots("the first", -2, True))
unset = Slots("the first", -2, True)
del unset.second
attributes("slot that is not set", unset, second=None)
shadowed = Shadowed.__new__(Shadowed)
shadowed.second, shadowed.last = -2, True
attributes("slot behind a property", shadowed, first=None)
attributes("NamedTuple", Numbers("the first", -2, True))
attributes("NamedTuple subclass", Record("the first", -2, True))
attributes("namedtuple", collections.namedtuple("Made", "last first second")(True, "the first", -2))
attributes("namedtuple without", collections.namedtuple("Made", "x y")(1, 2), first=None, second=None, last=None)
for i in range(30):
    slotted = type("Slotted%d" % i, (), {"__slots__": ["filler_%d" % filler for filler in range(i)] + ["first", "second", "last"]})
    attributes("slotted %d" % i, set_all(slotted(), "first %d" % i, i, i * 0.5), first="first %d" % i, second=i, last=i * 0.5)
attributes("function", set_all(lambda: None), optional=True)
attributes("class", set_all(type("Made", (), {})), optional=True)
attributes("class attributes", ClassAttributes(), first=None, second=None, last=None)
attributes("getters", Getters(), first=None, second=2, last=None)
attributes("empty", ClassAttributes.__new__(type("Empty", (), {})), first=None, second=None, last=None)
attributes("no attributes at all", 5, first=None, second=None, last=None)
attributes("None", None, first=None, second=None, last=None)
attributes("list", [1], first=None, second=None, last=None)
attributes("dict", {"first": 1}, first=None, second=None, last=None)
for i in range(30):
    # More types than the cache of a path has places.
    made = type("Made%d" % i, (), {})()
    for filler in range(i):
        setattr(made, "filler_%d" % filler, filler)
    attributes("made %d" % i, set_all(made, "first %d" % i, i, i * 0.5), first="first %d" % i, second=i, last=i * 0.5)
similar = set_all(Simple(None, None, None))
similar.firs, similar.first_, similar.First = "firs", "first_", "First"
attributes("similar names", similar)

# Items: [0], [1], [3].
Pair = collections.namedtuple("Pair", "left right")


class SubPair(Pair):
    pass


for name, x in {
    "tuple": ("zero", "one", 2, "three"), "list": ["zero", "one", 2, "three"], "list subclass": MyList(["zero", "one", 2, "three"]),
    "tuple subclass": MyTuple(("zero", "one", 2, "three")), "long list": ["zero", "one", 2, "three"] + [0] * 1000,
}.items():
    case(t.item, name, x, zero="zero", one="one", three="three")
case(t.item, "namedtuple", Pair("left", "right"), zero="left", one="right", three=None)
case(t.item, "namedtuple subclass", SubPair("left", "right"), zero="left", one="right", three=None)
case(t.item, "empty", [], zero=None, one=None, three=None)
case(t.item, "grown", [].__iadd__(["zero"]), zero="zero", one=None, three=None)
shrunk = ["zero", "one", "two", "three"]
shrunk.pop()
case(t.item, "shrunk", shrunk, zero="zero", one="one", three=None)
case(t.item, "not a sequence", {0: "zero"}, zero=None, one=None, three=None)
case(t.item, "str", "text", zero=None, one=None, three=None)

# Keys: ['k'], ['other'].
deleted = {"x": 1, "k": "old", "other": 3}
del deleted["k"]
again = dict(deleted, k="again")
large = {"key_%d" % i: i for i in range(500)}
large["k"] = "large"
case(t.key, "dict", {"k": "value", "other": 2}, k="value", other=2)
case(t.key, "dict, other order", {"other": 2, "k": "value"}, k="value", other=2)
case(t.key, "dict with other keys", {1: "x", None: 2, "k": "value", (1, 2): 3, "other": 2}, k="value", other=2)
case(t.key, "dict, deleted", deleted, k=None, other=3)
case(t.key, "dict, deleted and set again", again, k="again", other=3)
case(t.key, "dict, large", large, k="large", other=None)
case(t.key, "dict, empty", {}, k=None, other=None)
case(t.key, "dict subclass", MyDict(k="value"), k="value", other=None)
case(t.key, "OrderedDict", collections.OrderedDict([("k", "value")]), k="value", other=None)
case(t.key, "defaultdict", collections.defaultdict(list, k="value"), k="value", other=None)
case(t.key, "instance dict", vars(set_all(Simple(0, 0, 0))), k=None, other=None)
with_k = type("WithK", (), {})()
with_k.k, with_k.other = "split", 5
case(t.key, "split dict", vars(with_k), k="split", other=5)
case(t.key, "not a dict", ["k"], k=None, other=None)

# All items: [*], [*].name, [*][*], joined.
class Named:
    def __init__(self, name):
        self.name = name


class Key(typing.NamedTuple):
    name: str
    parts: tuple


for name, x, all_items in [
    ("list", ["a", "b"], ["a", "b"]), ("tuple", ("a",), ["a"]), ("empty list", [], []), ("empty tuple", (), []),
    ("numbers", [1, 2], [1, 2]), ("floats", (0.5, 1.5), [0.5, 1.5]), ("bools", [True, False], [True, False]),
    ("mixed", ["a", 1, 2.5, True], ["a", "1", "2.5", "true"]), ("with None", ["a", None, "b"], ["a", "b"]),
    ("enums", [Mixed.SUCCESS, Plain.TEXT, Number.SEVEN], ["success", "plain text", "7"]), ("paths", [pathlib.Path("/a", "b"), pathlib.Path("c")], ["/a/b", "c"]),
    ("UUIDs", [uuid.UUID(int=1)], [str(uuid.UUID(int=1))]), ("dict", {"a": 1, "b": 2}, [1, 2]), ("dict with other keys", {1: "x", (2,): "y"}, ["x", "y"]),
    ("empty dict", {}, []), ("dict, deleted", deleted, [1, 3]), ("split dict", vars(with_k), ["split", "5"]),
    ("list subclass", MyList(["a"]), ["a"]), ("tuple subclass", MyTuple(("a", "b")), ["a", "b"]), ("dict subclass", MyDict(k="v"), ["v"]),
    ("64 items", ["i%d" % i for i in range(64)], ["i%d" % i for i in range(64)]),
    ("65 items", ["i%d" % i for i in range(65)], PART(["i%d" % i for i in range(64)])),
    ("wide", ["\u20ac", "\xe9"], ["\u20ac", "\xe9"]), ("grown", [].__iadd__(["x", "y"]), ["x", "y"]),
    ("with an object", ["a", object(), "b"], PART(["a", "b"])), ("only objects", [object()], PART([])),
    ("cut", ["a", "long " * 200], PART(["a", ("long " * 200)[:256]])),
    ("long", ["0123456789" * 20] * 64, PART(["0123456789" * 20] * 47)),
    ("a str", "abc", None), ("a number", 5, None), ("a set", {1}, None), ("None", None, None),
]:
    case(t.items, name, x, all=all_items, behind="still there")
for name, x, names, parts in [
    ("objects", [Named("a"), Named("b")], ["a", "b"], []), ("named tuples", (Key("x", ("a", "b")), Key("y", ())), ["x", "y"], ["a/b", ""]),
    ("one without", [Named("a"), object(), Named("c")], PART(["a", "c"]), []), ("nothing", [], [], []),
    ("many", [Key("n%d" % i, ("a", "b", str(i))) for i in range(20)], ["n%d" % i for i in range(20)], ["a/b/%d" % i for i in range(20)]),
]:
    lists = [list(key.parts) for key in x if isinstance(key, Key)]
    partly = len(lists) < len(x)
    case(t.nested, name, x, names=names, parts=PART(parts) if partly else parts)
for name, x, text in [
    ("list", ["a", "b", "c"], "a/b/c"), ("tuple", ("a",), "a"), ("empty", [], ""), ("numbers", ("a", 5, True), "a/5/True"),
    ("with None", ["a", None], None), ("with an object", ["a", object()], None), ("too many", list(map(str, range(100))), CUT("/".join(map(str, range(100))))),
    ("no list", 5, None),
]:
    case(t.joined, name, x, v=text)
for name, x, values in [
    ("tags", {"a": "x", "b/c": 2, "d": True}, {"d.a": "x", "d.b/c": 2, "d.d": True}), ("empty", {}, {}),
    ("deleted", deleted, {"d.x": 1, "d.other": 3}), ("split", vars(with_k), {"d.k": "split", "d.other": 5}),
    ("with None", {"a": None, "b": "x"}, {"d.b": "x"}), ("other keys", {1: "x", "k": "v", "o": object()}, {"d.k": "v"}),
    ("nested", {"k": {"x": 1}, "l": "v"}, {"d.l": "v"}), ("dict subclass", MyDict(k="v"), {"d.k": "v"}), ("no dict", ["k"], {}),
    ("many", {"k%d" % i: i for i in range(70)}, {"d.k%d" % i: i for i in range(64)}),
]:
    case(t.entries, name, x, **values)

# Longer paths: .inner.name, .items[1].name, .table['k'].name
node = Simple(1, 2, 3)
node.name, node.inner, node.items, node.table = "node", node, [None, node], {"k": node}
case(t.path, "cycle", node, inner="node", item="node", key="node")
outer = Many(1, 2, 3)
outer.inner, outer.items, outer.table = set_all(Data("", 0)), (node, node), {"k": Mixed.SUCCESS}
outer.inner.name = Plain.TEXT
case(t.path, "many", outer, inner="plain text", item="node", key=OPTIONAL("SUCCESS"))
case(t.path, "broken", set_all(Simple(0, 0, 0)), inner=None, item=None, key=None)

for name, x, length in [
    ("list", [1, 2, 3], 3), ("tuple", (1,), 1), ("dict", {"a": 1}, 1), ("empty list", [], 0), ("empty dict", {}, 0),
    ("dict, deleted", deleted, 2), ("split dict", vars(with_k), 2), ("number", 5, None), ("object", node, None),
]:
    case(t.length, name, x, v=length)
for name, x, type_name in [
    ("int", 5, "int"), ("None", None, "NoneType"), ("class", node, "Simple"), ("enum", Mixed.SUCCESS, "Mixed"),
    ("type", int, "type"), ("exception", Error(), "Error"),
]:
    case(t.type_name, name, x, v=type_name)
case(t.a_global, "globals", None, setting="a global", number=41, missing=None)
for name, x, value in [
    ("str", "text", "text"), ("int", 2**40, 2**40), ("None", None, None), ("bool", False, False), ("enum", Mixed.SUCCESS, "success"),
]:
    case(t.returned, name, x, v=value, first=None)
case(t.returned, "object", set_all(Simple(0, 0, 0)), v=None, first="the first")
case(t.returned, "tuple", ("text", 1), v=None, first=None, item="text")
case(t.raised, "ValueError", ValueError("wrong", 5), type="ValueError", arg="wrong", detail=None)
case(t.raised, "no arguments", KeyError(), type="KeyError", arg=None, detail=None)
with_detail = Error("message")
with_detail.detail = "detail"
case(t.raised, "own exception", with_detail, type="Error", arg="message", detail="detail")
case(t.failing, "raised by C", "x", type="ValueError")

# Three times in turn, so that what the agent remembers of one object meets the others.
for repetition in range(3):
    for function, name, x in calls:
        try:
            if function is t.keyword:
                function(name, x=x)
            elif function is t.either and repetition:
                function(name, x=x)
            elif function is t.a_global:
                function(name)
            else:
                function(name, x)
        except Exception as exception:
            if function is not t.failing and exception is not x:
                raise
            exception.__traceback__ = None
with open(sys.argv[1], "w") as file:
    json.dump(expected, file)
