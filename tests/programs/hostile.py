"""A process that lies: its modules hold objects that look like functions, classes and modules and are not.

    hostile.py FILE     the objects are in this file, which is mapped and which others may change

Prints, as JSON, the words of the file that may be changed and what to, then calls an honest function until its standard
input ends, and prints what of the file is not as it was made, apart from those words.
"""
import ctypes
import gc
import json
import mmap
import os
import select
import sys
import types

import armed
import idle_target

SIZE = 1 << 20
WORD = 8
GARBAGE = [0, 8, 0x4141414141414141, 0x7FFFFFFFFFFFFFF8, 1 << 62, -1 & (1 << 64) - 1]
TYPE, TYPE_FLAGS, TYPE_MRO = 8, 168, 344
MANY = 1 << 20  # references that nobody gives back

gc.disable()  # it would follow the lies
with open(sys.argv[1], "r+b") as file:
    file.truncate(SIZE)
    memory = mmap.mmap(file.fileno(), SIZE)
BASE = ctypes.addressof(ctypes.c_char.from_buffer(memory))
used = 64
kept = []  # what is copied refers to it
changes = []  # offset, values


def copy(original):
    """The object's bytes at another place, with its header of the garbage collector."""
    global used
    kind = type(original)
    size = kind.__basicsize__
    if kind is str:
        size = original.__sizeof__()
    elif kind.__itemsize__:
        size += kind.__itemsize__ * (ctypes.c_uint64.from_address(id(original) + 16).value + 1)
    at = used + 64
    used = at + (size + 255 & -64)
    ctypes.memmove(BASE + at, id(original), size)
    put(at, 0, MANY)
    kept.append(original)
    return at


def put(at, offset, value):
    ctypes.c_uint64.from_address(BASE + at + offset).value = value & (1 << 64) - 1


def word(at, offset):
    return ctypes.c_uint64.from_address(BASE + at + offset).value


def forged(at):
    return ctypes.cast(BASE + at, ctypes.py_object).value


def field(original, value):
    """Where an object holds a pointer to another."""
    for offset in range(TYPE + WORD, 512, WORD):
        if ctypes.c_uint64.from_address(id(original) + offset).value == id(value):
            return offset


def function():
    exec("def work(n):\n    return n\n", namespace)
    return namespace.pop("work")


module = types.ModuleType("hostile_target")
namespace = module.__dict__
sys.modules["hostile_target"] = module
real = idle_target.work
VECTORCALL = armed._OFFSET
CODE = field(real, real.__code__)
late = []  # lies, told when all is in place


def hold(name, at):
    namespace[name] = forged(at)


# Functions: called through something else, with code that is none, of a type that is none, made of garbage, within themselves.
for name, lie in [
    ("foreign", lambda at: put(at, VECTORCALL, BASE)),
    ("codeless", lambda at: put(at, CODE, BASE + at)),
    ("wild", lambda at: put(at, CODE, 0xDEADBEEFDEADBEE8)),
    ("untyped", lambda at: put(at, TYPE, BASE + at)),
    ("null", lambda at: put(at, TYPE, 0)),
    ("itself", lambda at: [put(at, offset, BASE + at) for offset in range(WORD, 128, WORD)]),
]:
    at = copy(function())
    hold(name, at)
    late.append((lie, at))
# A function whose code's name is longer than memory, and one of a type that is a copy of the real one.
code = real.__code__
text = copy("work" * 20)
named = copy(code)
at = copy(function())
hold("long", at)
late.append((lambda at, named=named: put(at, CODE, BASE + named), at))
late.append((lambda at: put(at, field(code, code.co_name), BASE + text), named))
late.append((lambda at: put(at, 16, 1 << 62), text))
type_ = copy(types.FunctionType)
at = copy(function())
hold("copied", at)
late.append((lambda at: put(at, TYPE, BASE + type_), at))


# Classes: a method resolution order without end, flags that claim everything.
class Base:
    def method(self):
        return 1


order = copy(Base.__mro__)
for name, lie in [
    ("Endless", lambda at: put(at, TYPE_MRO, BASE + order)),
    ("Flagged", lambda at: put(at, TYPE_FLAGS, -1)),
    ("Circular", lambda at: [put(at, offset, BASE + at) for offset in range(TYPE_MRO - 96, TYPE_MRO + 64, WORD)]),
]:
    at = copy(Base)
    hold(name, at)
    late.append((lie, at))
late.append((lambda at: put(at, 16, 1 << 60), order))


# Modules: a dict that claims billions of entries, one that is its own keys.
def lying_module(name, lie):
    honest = types.ModuleType(name)
    honest.work = function()
    dictionary = copy(honest.__dict__)
    at = copy(honest)
    put(at, 16, BASE + dictionary)
    sys.modules[name] = forged(at)
    late.append((lie, dictionary))


lying_module("hostile_itself", lambda at: [put(at, offset, BASE + at) for offset in range(16, 48, WORD)])
keys = used + 64
used = keys + 4096
lying_module("hostile_huge", lambda at: [put(at, offset, BASE + keys) for offset in range(32, 48, WORD)])
late.append((lambda at: [put(at, offset, -1) for offset in range(0, 4096, WORD)], keys))

# What others change all the time: every word of some functions and of a class, to garbage and back.
for n in range(6):
    at = copy(function())
    hold("changing%d" % n, at)
    honest = [word(at, offset) for offset in range(0, 192, WORD)]
    changes += [
        [at + offset, [honest[offset // WORD], GARBAGE[(n + offset // WORD) % len(GARBAGE)]]]
        for offset in ([TYPE], [CODE], [VECTORCALL], range(TYPE, 128, WORD))[n % 4]
    ]
    # The agent may write here while the function is one.
    changes += [[at + VECTORCALL, []], [at + VECTORCALL + WORD, []]]
at = copy(Base)
hold("Changing", at)
changes += [[at + offset, [word(at, offset), GARBAGE[offset // WORD % len(GARBAGE)]]] for offset in (TYPE, TYPE_FLAGS, TYPE_MRO, 256, 264)]

for lie, at in late:
    lie(at)
mine = bytearray(memory)
print(json.dumps(changes), flush=True)
print("ready", flush=True)
n = 0
while not select.select([0], [], [], 0.01)[0]:
    assert real(n) == n, "a call went wrong"
    n += 1
allowed = {offset & -WORD for offset, _ in changes}
now = bytes(memory)
print(json.dumps([at for at in range(0, SIZE, WORD) if now[at : at + WORD] != mine[at : at + WORD] and at not in allowed]))
sys.stdout.flush()
os._exit(0)
