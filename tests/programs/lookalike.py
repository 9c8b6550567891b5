"""Runs on an interpreter that is not quite what its file says, and tells whether something was written to it.

    lookalike.py places     prints the file that holds the interpreter, and where in it `Py_Version` is (or -)
    lookalike.py            calls, and prints whether its function was armed
    lookalike.py patch      as before, but overwrites the bytes whose addresses it is told, `FROM TO` on a line, beforehand
"""
import ctypes
import mmap
import sys
import time

import armed
import idle_target


def place(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, offset, _, _, path = (line.split(None, 5) + [""])[:6]
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return path.strip(), address - start + int(offset, 16)


def places():
    path, _ = place(ctypes.cast(ctypes.pythonapi.Py_Initialize, ctypes.c_void_p).value)
    try:
        version = place(ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "Py_Version")))[1]
    except ValueError:
        version = "-"
    print(path, version)


def patch():
    print("ready", flush=True)
    start, end = (int(word) for word in sys.stdin.readline().split())
    page = start & -mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for mode in (7, 5):
        assert protect(ctypes.c_void_p(page), ctypes.c_size_t(end - page), mode) == 0, ctypes.get_errno()
        if mode == 7:
            ctypes.memset(start, 0xC3, end - start)
    print("patched", flush=True)


if sys.argv[1:] == ["places"]:
    places()
    sys.exit()
patching = sys.argv[1:] == ["patch"]
if patching:
    patch()
for n in range(20):
    idle_target.work(n)
    time.sleep(0.02)
if patching:
    sys.stdin.read()
print("armed" if armed.is_armed(idle_target.work) else "untouched")
