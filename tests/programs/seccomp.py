"""Installs a seccomp filter like a container runtime's, and calls armed functions under it.

    seccomp.py ERRNO     what a system call that is not allowed fails with
"""
import ctypes
import errno
import os
import struct
import sys
import threading

import unharmed_target as t

X86_64 = 0xC000003E
# Not allowed without capabilities in the default profile of container runtimes; and every call that it does not know.
DENIED = [
    101, 134, 135, 136, 139, 155, 156, 163, 164, 165, 166, 167, 168, 169, 172, 173, 174, 175, 176, 177, 178, 179, 180, 212,
    227, 237, 238, 239, 246, 248, 249, 250, 256, 272, 279, 298, 304, 305, 308, 310, 311, 312, 313, 320, 321, 323,
]
LAST_OLD, FIRST_NEW, LAST_NEW = 334, 424, 450
LOAD, EQUAL, ABOVE, RETURN = 0x20, 0x15, 0x25, 0x06
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def instruction(code, k, true=0, false=0):
    return struct.pack("HBBI", code, true, false, k)


def install(error):
    deny = instruction(RETURN, ERROR | error)
    program = [
        instruction(LOAD, 4), instruction(EQUAL, X86_64, 1, 0), instruction(RETURN, KILL), instruction(LOAD, 0),
    ]
    for number in DENIED:
        program += [instruction(EQUAL, number, 0, 1), deny]
    program += [
        instruction(ABOVE, LAST_OLD, 1, 0), instruction(RETURN, ALLOW),
        instruction(ABOVE, FIRST_NEW - 1, 1, 0), deny,
        instruction(ABOVE, LAST_NEW, 0, 1), deny,
        instruction(RETURN, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    argument = Program(len(program), ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(argument), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
    assert libc.syscall(250, 0, 0, 0) == -1 and ctypes.get_errno() == error, ctypes.get_errno()  # keyctl


def work():
    for i in range(100):
        assert t.outer(t.recurse, 10) == 10
    try:
        t.around(t.raising, ValueError("x"))
    except ValueError:
        pass
    return t.quick(3)


print(work())
install(getattr(errno, sys.argv[1]))
print(work())
thread = threading.Thread(target=lambda: print(work()))
thread.start()
thread.join()
child = os.fork()
if child == 0:
    os._exit(work())
print(os.WEXITSTATUS(os.waitpid(child, 0)[1]))
