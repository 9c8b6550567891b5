"""Programs, maps and links of the kernel, by their ids.

    bpf_objects.py PID      prints those that a process holds open, as JSON
    bpf_objects.py left     prints how many of those that it reads from its standard input still exist
"""
import ctypes
import json
import os
import struct
import sys

SYS_BPF = 321
# BPF_*_GET_FD_BY_ID. A link's fdinfo names its program too, so it comes first.
KINDS = {"link": 30, "map": 14, "prog": 13}

libc = ctypes.CDLL(None, use_errno=True)


def held(pid):
    found = {kind: set() for kind in KINDS}
    folder = "/proc/%s/fdinfo" % pid
    for name in os.listdir(folder):
        try:
            with open(os.path.join(folder, name)) as file:
                words = dict(line.split(None, 1) for line in file if len(line.split()) > 1)
        except FileNotFoundError:
            continue  # closed meanwhile
        for kind, ids in found.items():
            if kind + "_id:" in words:
                ids.add(int(words[kind + "_id:"]))
                break
    return {kind: sorted(ids) for kind, ids in found.items()}


def exists(kind, number):
    attributes = ctypes.create_string_buffer(struct.pack("II", number, 0), 144)
    descriptor = libc.syscall(SYS_BPF, KINDS[kind], attributes, len(attributes))
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0


if sys.argv[1] == "left":
    print(sum(exists(kind, number) for kind, ids in json.load(sys.stdin).items() for number in ids))
else:
    print(json.dumps(held(sys.argv[1])))
