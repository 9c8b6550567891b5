"""What tests/python_live.rs looks at from outside. Valid on CPython 3.8 to 3.14."""
import collections
import enum
import functools


def plain(a, b=2, *, c=3):
    return a + b + c


aliased = plain
lam = lambda x: x + 1  # noqa: E731


def deco(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        return f(*args, **kwargs)

    return wrapper


def no_wraps(f):
    def anything(*args, **kwargs):
        return f(*args, **kwargs)

    return anything


class ObjectDeco:
    def __init__(self, f):
        self.callback = f

    def __call__(self, *args):
        return self.callback(*args)


class SlotDeco:
    __slots__ = ("fn", "other")

    def __init__(self, f):
        self.fn = f

    def __call__(self, *args):
        return self.fn(*args)


@deco
def decorated(x):
    return x * 2


@no_wraps
def hidden(x):
    return x * 3


@deco
@no_wraps
@deco
def deeply(x):
    return x * 4


@ObjectDeco
def in_object(x):
    return x * 5


@SlotDeco
def in_slot(x):
    return x * 6


@functools.lru_cache(maxsize=None)
def cached(x):
    return x * 7


part = functools.partial(plain, 1)


class Base:
    def inherited(self):
        return "base"

    def overridden(self):
        return "base"


class Klass(Base):
    attribute = 1

    def method(self, x):
        return ("method", x)

    def overridden(self):
        return "klass"

    @staticmethod
    def static(x):
        return ("static", x)

    @classmethod
    def klass(cls, x):
        return ("class", x)

    @property
    def prop(self):
        return "prop"

    @functools.cached_property
    def lazy(self):
        return "lazy"

    @deco
    def decorated(self, x):
        return ("decorated", x)

    @classmethod
    @deco
    def decorated_class(cls, x):
        return ("decorated class", x)

    class Nested:
        def deep(self):
            return "deep"

    def has_locals(self):
        def local():
            return self

        return local


class Third(Klass):
    def overridden(self):
        return "third"


instance_of_klass = Klass()
bound = instance_of_klass.method


def outer(n):
    def inner():
        return n

    def unused():
        return n

    class Local:
        def method(self):
            return n

    def middle():
        def innermost():
            return n

        return innermost

    inner.middle = middle
    inner.local_class = Local
    return inner


inners = [outer(i) for i in range(3)]
held = {"key": (outer(3), None)}


def far(n):
    def inner():
        return n

    return inner


class Registry:
    def __init__(self):
        self.commands = {"a": ObjectDeco(far(4)), "b": ObjectDeco(far(5))}
        self.me = self


registry = Registry()
wrapped_inner = deco(outer(5))
in_default = lambda f=outer(6): f  # noqa: E731
innermost = inners[0].middle()
local_of_method = instance_of_klass.has_locals()
cyclic = []
cyclic.append(cyclic)
cyclic_dict = {}
cyclic_dict["self"] = cyclic_dict


def generator():
    yield 1


async def coroutine():
    return 1


async def async_generator():
    yield 1


# Values.


class Text(str):
    pass


class Number(int):
    pass


class Color(enum.Enum):
    RED = "red"


Point = collections.namedtuple("Point", "x y")


class Pair(tuple):
    pass


class Sequence(list):
    pass


class Mapping(dict):
    pass


TEXTS = ["", "a", "ascii text", "x" * 5000, "caf\u00e9", "\u017elut\u00fd", "\U0001f40d snake", "\x00nul", Text("sub"), Text("caf\u00e9"), Text("\U0001f40d")]
INTS = [0, 1, -1, 255, 256, 2**15, 2**30 - 1, 2**30, -(2**30), 2**60, -(2**62), 2**63 - 1, -(2**63), True, False, Number(12345)]
BIG = [2**63, -(2**63) - 1, 2**90, 10**100]
FLOATS = [0.0, 1.5, -2.25, 1e300]

general = {1: "one", "two": 2, (3,): None}
deleted = {str(i): i for i in range(50)}
for _i in range(0, 50, 3):
    del deleted[str(_i)]
large = {"key%d" % i: i for i in range(70000)}
DICTS = [{}, {"a": 1}, general, deleted, large, {i: i for i in range(300)}, Mapping(x=1, y=2)]
SEQUENCES = [(), (1,), tuple(range(500)), [], [1], list(range(500)), Point(1, 2), Pair((7, 8)), Sequence([9])]


class Simple:
    def __init__(self):
        self.first = "one"
        self.second = 2


class Slotted:
    __slots__ = ("alpha", "beta", "empty")

    def __init__(self):
        self.alpha = "a"
        self.beta = 2


class SlottedChild(Slotted):
    __slots__ = ("gamma",)

    def __init__(self):
        super().__init__()
        self.gamma = 3


class Mixed(Slotted):
    def __init__(self):
        super().__init__()
        self.extra = "in the dict"


class WithInt(int):
    pass


def many():
    made = Simple()
    for i in range(100):
        setattr(made, "attr%d" % i, i)
    return made


def materialised():
    made = Simple()
    made.__dict__["third"] = 3
    return made


def looked_at():
    made = Simple()
    made.__dict__  # noqa: B018
    made.fourth = 4
    return made


def replaced():
    made = Simple()
    made.__dict__ = {"other": "dict", "second": 22}
    return made


def removed():
    made = Simple()
    del made.first
    return made


def variable_size():
    made = WithInt(2**100)
    made.attribute = "behind the digits"
    return made


def tuple_with_dict():
    made = Pair((1, 2, 3))
    made.attribute = "behind the items"
    return made


class Failure(Exception):
    pass


def failure():
    made = Failure("message")
    made.code = 7
    return made


INSTANCES = [
    Simple(), Slotted(), SlottedChild(), Mixed(), many(), materialised(), looked_at(), replaced(), removed(),
    variable_size(), tuple_with_dict(), failure(), Color.RED, Text("plain"), registry, in_object,
]
for _name, _value in (("attribute", 1), ("more", "two")):
    setattr(INSTANCES[13], _name, _value)


def attributes(made):
    """Name to id of everything in the instance's dict and slots."""
    found = {}
    for klass in type(made).__mro__:
        slots = klass.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(made, name):
                found[name] = id(getattr(made, name))
    return found


def with_dict(made):
    found = attributes(made)
    found.update((name, id(value)) for name, value in getattr(made, "__dict__", {}).items())
    return found
