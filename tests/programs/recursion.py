"""Deep recursion in armed functions."""
import threading

import unharmed_target as t


def depth():
    """How deep a recursion can go: an untraced program knows exactly."""
    reached = [0]
    try:
        t.deepest(0, reached)
    except RecursionError as error:
        return reached[0], str(error)


print(t.recurse(900))
print(t.even(900))
print(depth())
print(t.recurse(900), t.even(901))
threads = [threading.Thread(target=lambda: print(t.recurse(900))) for _ in range(3)]
for thread in threads:
    thread.start()
    thread.join()
print(depth())
print(t.quick(1))
