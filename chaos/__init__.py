"""Chaos: real processes, killed, paused and cut off at random, and a look at whether every promise was kept.

`make chaos`, or `python -m chaos --help`. What the tasks did is known from files of their own (`witness.py`), not
from the system under test; `verdict.py` compares that with what was promised.
"""
