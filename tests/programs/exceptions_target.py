"""What is watched: functions that an exception leaves, or comes into."""
import contextlib


def run(case, function):
    return function()


def raise_often(number):
    raise ValueError("number %d" % number)


def ends_normally(error):
    raise error


@contextlib.contextmanager
def block(case):
    yield


class Phase:
    def __init__(self, case):
        self.case = case

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return None


def node(case, function):
    return function()


class Handler:
    def handle(self, error, context):
        return str(type(error))


def attempt(function):
    return function()
