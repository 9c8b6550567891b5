"""Calls an armed function before and after standard input is closed."""
import sys

import idle_target

for n in range(10):
    idle_target.work(n)
print("ready", flush=True)
sys.stdin.read()
for n in range(10):
    idle_target.work(n)
