"""Uses context managers in all ways: nested, left by an exception, in another thread, never."""
import contextlib
import sys
import threading

import armed

leave = contextlib._GeneratorContextManager.__exit__
if armed.is_armed(leave):
    sys.exit("the end of all context managers is watched before there is one to watch")


@contextlib.contextmanager
def foreign():
    yield


with foreign():
    pass

import contexts_target as target  # noqa: E402

if not armed.is_armed(leave):
    sys.exit("the end of context managers is not watched")

for n in range(3):
    with target.block("outer") as outer:
        with foreign():
            with target.block(name="inner"):
                assert outer == "outer"
    try:
        with target.block("escapes"):
            raise ValueError("out")
    except ValueError:
        pass
    with target.block("swallowed", swallow=True):
        raise KeyError("in")
    with target.Holder().held("method"), target.Holder.of_class("class"):
        pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(target.block("stack"))
        stack.enter_context(target.block("upper"))
    target.block("never")
    crossed = target.block("crossed")
    crossed.__enter__()
    thread = threading.Thread(target=crossed.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
