"""Functions whose arguments, results and exceptions are captured. The first argument is the name of the case."""

SETTING = "a global"
BEHIND = "still there"
NUMBER = 41


def value(case, x):
    pass


def attributes(case, x):
    pass


def item(case, x):
    pass


def key(case, x):
    pass


def path(case, x):
    pass


def long_text(case, x):
    pass


def items(case, x):
    pass


def nested(case, x):
    pass


def joined(case, x):
    pass


def entries(case, x):
    pass


def length(case, x):
    pass


def type_name(case, x):
    pass


def keyword(case, *, x):
    pass


def either(case, x):
    pass


def a_global(case):
    pass


def returned(case, x):
    return x


def raised(case, x):
    raise x


def failing(case, x):
    return int(x)
