"""Calls until its standard input ends, checks each result, and then that it is what it was."""
import os
import select
import threading

from node_target import work


def itself():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), work.__code__, work.__name__


before = itself()
print("ready", flush=True)
n = 0
while not select.select([0], [], [], 0.002)[0]:
    assert work(n) == n + 1
    n += 1
assert itself() == before
print("unharmed")
