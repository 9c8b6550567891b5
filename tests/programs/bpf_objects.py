"""Prints how many BPF programs, maps and links the kernel has."""
import ctypes
import struct

SYS_BPF = 321
NEXT_PROGRAM, NEXT_MAP, NEXT_LINK = 11, 12, 31

libc = ctypes.CDLL(None, use_errno=True)


def count(command):
    attributes = ctypes.create_string_buffer(144)
    found, last = 0, 0
    while True:
        struct.pack_into("III", attributes, 0, last, 0, 0)
        if libc.syscall(SYS_BPF, command, attributes, len(attributes)):
            return found
        found, last = found + 1, struct.unpack_from("I", attributes, 4)[0]


print(count(NEXT_PROGRAM), count(NEXT_MAP), count(NEXT_LINK))
