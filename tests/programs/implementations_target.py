import abc
import functools


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Base(abc.ABC):
    @abc.abstractmethod
    def handle(self, n):
        """Not called."""


class First(Base):
    def handle(self, n):
        return n


class Inherits(First):
    pass


class Deep(Inherits):
    def handle(self, n):
        return super().handle(n)


class Left(Base):
    def handle(self, n):
        return n


class Right(Base):
    def handle(self, n):
        return n


class Diamond(Left, Right):
    def handle(self, n):
        return n


class Decorated(Base):
    @decorated
    def handle(self, n):
        return n


class Cached(Base):
    @functools.lru_cache(maxsize=None)
    def handle(self, n):
        return n


class Alias(Base):
    handle = lambda self, n: n  # noqa: E731


class Generator(Base):
    def handle(self, n):
        yield n


def scan():
    pass
