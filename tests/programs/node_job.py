"""A job: so many calls of a function of another module, with a pause after each."""
import sys
import time

from node_target import work

print("ready", flush=True)
total = 0
for n in range(int(sys.argv[1])):
    total += work(n)
    time.sleep(float(sys.argv[2]))
assert total == sum(range(1, int(sys.argv[1]) + 1))
