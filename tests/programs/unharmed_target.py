"""Functions that are armed."""


def around(function, *args):
    return function(*args)


def outer(function, *args):
    return inner(function, *args)


def inner(function, *args):
    return function(*args)


def recurse(n):
    return 0 if n == 0 else 1 + recurse(n - 1)


def deepest(n, reached):
    reached[0] = n
    return deepest(n + 1, reached)


def even(n):
    return True if n == 0 else odd(n - 1)


def odd(n):
    return False if n == 0 else even(n - 1)


def raising(exception):
    raise exception


def numbers(n):
    for i in range(n):
        yield i


async def later(n):
    return n


def quick(n):
    return n + 1
