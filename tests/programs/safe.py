"""Calls armed functions in four threads until standard input is closed, and checks every result."""
import sys
import threading
import time

import safe_target as t

stop = False
wrong = []
calls = [0] * 4


def work(number):
    i = 0
    while not stop:
        for _ in range(50):
            i += 1
            got = t.outer(i, number)
            if got != 3 * (i + number):
                wrong.append((i, number, got))
            calls[number] += 1
        time.sleep(0.001)


threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.read()
stop = True
for thread in threads:
    thread.join()
print("wrong:", wrong[:5])
print("all threads worked:", all(calls))
sys.exit(7)
