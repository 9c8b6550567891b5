"""gevent: armed functions that are left by a switch."""
from gevent import monkey

monkey.patch_all()
import queue
import threading
import time

import gevent
import unharmed_target as t

print(sum(t.quick(i) for i in range(20)))
done = []


def work(n):
    for i in range(10):
        t.around(gevent.sleep, 0.0001 * ((n * 7 + i) % 5))
        t.outer(time.sleep, 0)
    done.append(t.quick(n))


gevent.joinall([gevent.spawn(work, n) for n in range(20)])
print(sorted(done))
items = queue.Queue(2)
consumer = threading.Thread(target=lambda: print(sum(t.around(items.get) for _ in range(100))))
consumer.start()
for i in range(100):
    t.around(items.put, i)
consumer.join()
