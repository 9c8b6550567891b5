"""Whether functions are armed: read from the process's own memory, without help from the agent.

A function is armed when the pointer `vectorcall` in its object is not the one of other functions.
"""
import sys
import time
import types


def _word(address):
    with open("/proc/self/mem", "rb", 0) as memory:
        memory.seek(address)
        return int.from_bytes(memory.read(8), "little")


# PyTypeObject.tp_vectorcall_offset
_OFFSET = _word(id(types.FunctionType) + 56)


def is_armed(function):
    return _word(id(function) + _OFFSET) != _word(id(_word) + _OFFSET)


def wait_until_armed(*functions, limit=40):
    end = time.monotonic() + limit
    for function in functions:
        while not is_armed(function):
            if time.monotonic() > end:
                sys.exit("%s is not armed after %s s" % (function.__qualname__, limit))
            time.sleep(0.01)
    # What else belongs to arming follows at once.
    time.sleep(0.2)
