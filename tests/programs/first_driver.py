"""Starts processes of this interpreter, three at once: first_driver.py COUNT PROGRAM."""
import subprocess
import sys

count, program = int(sys.argv[1]), sys.argv[2]
for first in range(0, count, 3):
    numbers = range(first, min(first + 3, count))
    started = [subprocess.Popen([sys.executable, "-S", "-E", "-B", program, str(n)]) for n in numbers]
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit("a process failed: %r" % codes)
