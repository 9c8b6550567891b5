"""Armed calls in children of every kind. Prints `{kind: [[pid, n], ...]}`."""
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys

import process_target as t


def forked(n):
    pid = os.fork()
    if pid == 0:
        t.work(n)
        os._exit(0)
    os.waitpid(pid, 0)
    return pid, n


def spawned():
    out, into = os.pipe()
    words = [sys.executable, "-B", __file__, "child"]
    pid = os.posix_spawn(sys.executable, words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, into, 1)])
    os.close(into)
    with os.fdopen(out) as lines:
        result = json.loads(lines.read())
    os.waitpid(pid, 0)
    return result


def main():
    seen = {"main": [t.work(0)]}
    for method in ["fork", "spawn", "forkserver"]:
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            seen[method] = pool.map(t.work, range(10), chunksize=1)
            pool.close()
            pool.join()
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            seen[method + " executor"] = list(pool.map(t.work, range(20, 26)))
    seen["os.fork"] = [forked(n) for n in range(30, 34)]
    out = subprocess.run([sys.executable, "-B", __file__, "child"], stdout=subprocess.PIPE, check=True).stdout
    seen["subprocess"] = [json.loads(out)]
    command = 'true; "%s" -B "%s" child; true' % (sys.executable, __file__)
    out = subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE, check=True).stdout
    seen["through a shell"] = [json.loads(out)]
    seen["posix_spawn"] = [spawned()]
    seen["main"].append(t.work(99))
    print(json.dumps(seen))


if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        print(json.dumps(t.work(50)))
    else:
        t.around(main)
