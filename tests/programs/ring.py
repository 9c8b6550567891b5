"""A process whose list of interpreters has no end. Calls until its standard input ends, and tells whether its function was armed."""
import ctypes
import os
import select
import sys

import armed
import idle_target

try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

api = ctypes.pythonapi
for name in ("PyInterpreterState_Main", "PyInterpreterState_Head"):
    getattr(api, name).restype = ctypes.c_void_p
kept = interpreters.create()  # in old versions it ends when nobody refers to it
first, last = api.PyInterpreterState_Head(), api.PyInterpreterState_Main()


def word(address):
    return ctypes.c_uint64.from_address(address)


for offset in range(0, 1 << 14, 8):
    if word(first + offset).value == last and word(last + offset).value == 0:
        word(last + offset).value = first
        break
else:
    sys.exit("the list was not found")
print("ready", flush=True)
n = 0
while not select.select([0], [], [], 0.005)[0]:
    assert idle_target.work(n) == n
    n += 1
print("armed" if armed.is_armed(idle_target.work) else "untouched", flush=True)
os._exit(0)
