"""As `node_job.py`, without an import statement that tells it."""
import importlib
import sys
import time

work = importlib.import_module("node_target").work
print("ready", flush=True)
for n in range(int(sys.argv[1])):
    work(n)
    time.sleep(float(sys.argv[2]))
