"""Runs a command in which the system call `bpf` is not allowed, as in a container."""
import ctypes
import errno
import os
import struct
import sys


def instruction(code, k, true=0, false=0):
    return struct.pack("HBBI", code, true, false, k)


program = [
    instruction(0x20, 0), instruction(0x15, 321, 0, 1), instruction(0x06, 0x00050000 | errno.EPERM),
    instruction(0x06, 0x7FFF0000),
]
code = ctypes.create_string_buffer(b"".join(program))


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(program), ctypes.addressof(code))), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
