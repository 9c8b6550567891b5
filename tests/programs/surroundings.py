"""Prints everything that a process inherits and that a wrapper could change."""
import os
import resource
import stat
import sys


def status(name):
    with open("/proc/self/status") as file:
        return [line.split()[1] for line in file if line.startswith(name + ":")]


def kind(fd):
    try:
        return fd, oct(stat.S_IFMT(os.fstat(int(fd)).st_mode)), os.get_inheritable(int(fd))
    except OSError:
        return None


print("environment", sorted(os.environ.items()))
print("arguments", sys.argv[1:])
print("folder", os.getcwd())
print("files", [kind(fd) for fd in sorted(os.listdir("/proc/self/fd"), key=int) if kind(fd)])
for name in ["SigBlk", "SigIgn", "SigCgt", "SigPnd", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Umask", "TracerPid",
             "Cpus_allowed", "Threads"]:
    print(name, status(name))
print("nice", os.nice(0), "scheduler", os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)
for name in sorted(name for name in dir(resource) if name.startswith("RLIMIT_")):
    print(name, resource.getrlimit(getattr(resource, name)))
with open("/proc/self/oom_score_adj") as file:
    print("oom_score_adj", file.read())
with open("/proc/self/timerslack_ns") as file:
    print("timerslack", file.read())
with open("/proc/self/personality") as file:
    print("personality", file.read())
print("terminal", [os.isatty(fd) for fd in range(3)])
print("input", sys.stdin.buffer.read())
sys.stdout.flush()
sys.stdout.buffer.write(bytes(range(256)) * 300)
sys.stdout.flush()
sys.exit(201)
