"""Ends while eight daemon threads are inside armed functions."""
import sys
import threading
import time

import unharmed_target as t


def busy():
    while True:
        t.outer(t.recurse, 10)


def idle():
    while True:
        t.outer(time.sleep, 30)


def short():
    while True:
        t.outer(time.sleep, 0.001)


for function in [busy, busy, idle, idle, short, short, short, short]:
    threading.Thread(target=t.around, args=(function,), daemon=True).start()
time.sleep(0.05)
print("the end")
sys.exit(t.quick(4))
