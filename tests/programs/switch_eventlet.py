"""eventlet: armed functions that are left by a switch."""
import warnings

warnings.simplefilter("ignore")
import eventlet

eventlet.monkey_patch()
import time

import unharmed_target as t

print(sum(t.quick(i) for i in range(20)))


def work(n):
    for i in range(10):
        t.around(eventlet.sleep, 0.0001 * ((n * 7 + i) % 5))
        t.outer(time.sleep, 0)
    return t.quick(n)


pool = eventlet.GreenPool(10)
print(sorted(pool.imap(work, range(20))))
