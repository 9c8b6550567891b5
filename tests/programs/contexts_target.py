import contextlib


@contextlib.contextmanager
def block(name, swallow=False):
    try:
        yield name
    except KeyError:
        if not swallow:
            raise


class Holder:
    @contextlib.contextmanager
    def held(self, name):
        yield self

    @classmethod
    @contextlib.contextmanager
    def of_class(cls, name):
        yield cls
