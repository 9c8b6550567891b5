"""Counts what the gate of this process must have been hit by: modules imported from source, and armed calls.

Run with -S and -I, so that nothing is imported between the start and the first line.
"""
import sys

sources = []


class Watch:
    """Finds modules as Python does, and notes those that will be executed from source."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        for finder in finders:
            spec = finder.find_spec(name, path, target)
            if spec:
                if type(spec.loader).__name__ == "SourceFileLoader":
                    sources.append(name)
                return spec


finders = list(sys.meta_path)
sys.meta_path[:] = [Watch]
sys.path.insert(0, sys.argv[1])

import argparse
import ast
import bisect
import calendar
import csv
import dataclasses
import difflib
import email.message
import email.policy
import fractions
import http.client
import json
import logging.config
import queue
import random
import tarfile
import textwrap
import unittest.mock
import urllib.request
import xml.dom.minidom
import zipfile

import unharmed_target as t

calls = 0
for n in range(300):
    t.outer(t.quick, n)  # and `inner`
    t.recurse(4)
    calls += 8


def unarmed(n):
    return n


for n in range(1000):
    unarmed(n)
    eval("n + 1")
    exec("m = n")
eval("1 + 1")
print(json.dumps({"modules": len(sources), "calls": calls}))
