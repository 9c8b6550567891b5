"""Imports the fixture, then answers one expression per line of standard input with one line of JSON."""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
import floe_fixture as f  # noqa: E402

names = {"f": f, "sys": sys, "json": json, "os": os}
print(json.dumps({"ready": os.getpid()}), flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        break
    try:
        answer = {"ok": eval(line, names)}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
