"""Greenlets that return from armed functions in another order than they entered them.

    switch_greenlet.py exec     in one thread, in several, in a child, and in a child that switches before its parent
    switch_greenlet.py attach   prints `ready` and switches until standard input is closed
"""
import os
import select
import sys
import threading

import greenlet
import unharmed_target as t


def out_of_order(n):
    """`first` enters before `second` and returns before it."""
    trail = []

    def first():
        trail.append(t.around(second.switch))
        second.switch()

    def second_body():
        trail.append(t.outer(one.switch, "from second"))
        main.switch()

    main = greenlet.getcurrent()
    one = greenlet.greenlet(first)
    second = greenlet.greenlet(second_body)
    trail.append(t.quick(n))
    t.inner(one.switch)
    trail.append(t.quick(n + 1))
    return trail


def thrown():
    def body():
        try:
            t.around(main.switch)
        except ValueError as error:
            return str(error)

    main = greenlet.getcurrent()
    other = greenlet.greenlet(body)
    other.switch()
    return t.around(other.throw, ValueError("thrown"))


def rounds(n):
    total = 0
    for i in range(n):
        total += sum(x for x in out_of_order(i) if isinstance(x, int))
        assert thrown() == "thrown"
    return total


def in_a_child(n):
    child = os.fork()
    if child == 0:
        os._exit(rounds(n) % 251)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1])


if sys.argv[1] == "attach":
    print("ready", flush=True)
    count = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        assert rounds(5) == 35
        t.outer(t.quick, 1)
    print("switched all the time")
else:
    print(sum(t.quick(i) for i in range(20)))
    print("child before the first switch:", in_a_child(20))
    print(out_of_order(3))
    print(rounds(200))
    results = []
    threads = [threading.Thread(target=lambda: results.append(rounds(100))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(results)
    print("child:", in_a_child(20))
