"""Calls until its standard input ends, checks each result, and then that it is what it was.

    node_cycles.py [PAUSE]     so many seconds between calls
"""
import os
import select
import sys
import threading

from node_target import work


def itself():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), work.__code__, work.__name__


before = itself()
pause = float(sys.argv[1]) if len(sys.argv) > 1 else 0.002
print("ready", flush=True)
n = 0
while not select.select([0], [], [], pause)[0]:
    assert work(n) == n + 1
    n += 1
assert itself() == before
print("unharmed")
