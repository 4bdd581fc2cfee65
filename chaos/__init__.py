"""Chaos tests: random failures of a real system from a seed, and a check of all promises.

`make chaos`, or `python -m chaos --help`. What the tasks did is known from files of their own (`records.py`), not
from the system under test; `verdict.py` compares that with what was promised.
"""

import sys
from pathlib import Path

# The proxy and the SQL servers are those of the tests, which import each other by their bare names.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
