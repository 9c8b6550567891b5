"""Evaluates and executes a million times each, imports modules, calls functions of its own; is not traced."""
import colorsys
import wave

evaluated, executed = compile("n + 1", "<eval>", "eval"), compile("n = 5", "<exec>", "exec")
n = 5
for _ in range(1000000):
    eval(evaluated)
    exec(executed)


def function(n):
    return n


print(sum(function(n) for n in range(100000)), eval("n"))
