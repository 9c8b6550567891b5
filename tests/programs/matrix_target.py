"""One function for each kind of call. Those that are called in one way only take their arguments in that way."""


def exact(a, b):
    return b


def defaults(a, b=7, c="x"):
    return a


def keyword(a, b):
    return a


def keyword_only(a, *, b=None):
    return a


def star(*args):
    return args


def star_star(**kwargs):
    return kwargs


def from_map(a):
    return a


def sort_key(a):
    return -a


def partial(a, b):
    return a


def recurse(n):
    return 0 if n == 0 else 1 + recurse(n - 1)


def threaded(a):
    return a


def thread_target(a, b=None):
    return a


def forked(a):
    return a


def generator(a):
    yield a
    yield a + 1


async def coroutine(a):
    return a


def raises(a):
    raise ValueError("no %d" % a)


class Thing:
    def __init__(self, name):
        self.name = name

    def method(self, a):
        return a

    def bound(self, a):
        return a

    @classmethod
    def class_method(cls, a):
        return a

    @staticmethod
    def static_method(a):
        return a

    @property
    def getter(self):
        return self.name

    def __getitem__(self, a):
        return a

    def __call__(self, a):
        return a


class Derived(Thing):
    def method(self, a):
        return super().method(a)


class Made:
    def __init__(self, a, b="made"):
        self.a = a
