def outer(a, b):
    return inner(a) + inner(b)


def inner(n):
    if n % 7 == 0:
        try:
            return failing(n)
        except ValueError as error:
            return error.args[0]
    return leaf(n, twice=n * 2)


def leaf(n, twice):
    return n + twice


def failing(n):
    raise ValueError(n * 3)
