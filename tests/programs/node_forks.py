"""Forks so many children at once, each of which forks one more; each calls twice."""
import os
import sys

from node_target import work

print("ready", flush=True)
children = []
for n in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        assert work(n) == n + 1
        grandchild = os.fork()
        assert work(n) == n + 1
        os._exit(0 if grandchild == 0 or os.waitpid(grandchild, 0)[1] == 0 else 1)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
