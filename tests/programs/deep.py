"""Raises the recursion limit and recurses 50,000 deep: from CPython 3.11 on this needs no C stack.

    deep.py before|after|inside|thread     when the limit is raised: before the armed import, after it, in an armed call
"""
import sys
import threading

DEPTH = 50000


def down(n):
    return 0 if n == 0 else 1 + down(n - 1)


def go():
    return down(DEPTH)


when = sys.argv[1]
if when == "before":
    sys.setrecursionlimit(100000)
import unharmed_target as t

print(t.quick(1))
if when == "after":
    sys.setrecursionlimit(100000)
if when == "inside":
    t.around(sys.setrecursionlimit, 100000)
if when == "thread":
    # A small stack is enough for pure Python calls.
    sys.setrecursionlimit(3000)
    threading.stack_size(256 * 1024)
    results = []
    thread = threading.Thread(target=lambda: results.append(down(2500)))
    thread.start()
    thread.join()
    print(results)
else:
    print(down(DEPTH))
    print(t.around(go))
print(t.quick(2))
