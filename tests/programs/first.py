"""Calls a function of a catalogue module on the line after its import."""
import sys

number = int(sys.argv[1])
import first_target
first_target.work(number)
