"""Ends inside armed functions, with others of them open in other threads.

    ending.py sigkill|sigterm|exit|abort|exec|wait     wait: prints `ready` and stays there
"""
import os
import signal
import sys
import threading
import time

import process_target as t

ENDS = {
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "exit": lambda: os._exit(3),
    "abort": os.abort,
    "exec": lambda: os.execv("/bin/sh", ["/bin/sh", "-c", "exit 4"]),
    "wait": lambda: (print("ready", flush=True), time.sleep(60)),
}
threading.Thread(target=t.stay, args=(time.sleep, 60), daemon=True).start()
time.sleep(0.1)
t.around(t.stay, ENDS[sys.argv[1]])
