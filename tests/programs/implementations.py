"""Calls implementations of a base class's method, of classes that are made before and after the base's module is there.

Prints how often each class's own code runs while it can be watched.
"""
import collections
import json

import implementations_target as target

seen = collections.Counter()


def call(instance, *classes):
    for n in range(3):
        instance.handle(n)
        seen.update(classes)


call(target.First(), "First")
call(target.Inherits(), "Inherits")
call(target.Deep(), "Deep", "Deep")  # its own, and First's through super()
call(target.Left(), "Left")
call(target.Right(), "Right")
call(target.Diamond(), "Diamond")
call(target.Decorated(), "Decorated")
call(target.Cached(), "Cached")
call(target.Alias(), "Alias")
for n in target.Generator().handle(0):
    pass


class After(target.Base):
    def handle(self, n):
        return n


class Below(target.Deep):
    def handle(self, n):
        return n


for n in range(3):
    After().handle(n)
    Below().handle(n)
target.scan()
call(After(), "After")
call(Below(), "Below")

import implementations_late  # noqa: E402

call(implementations_late.Late(), "Late")
print(json.dumps(seen))
