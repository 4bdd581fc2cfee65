"""Chaos: a real system, disturbed at random by a seed, and a check of whether every promise was kept.

`make chaos`, or `python -m chaos --help`. What the tasks did is known from files of their own (`witness.py`), not
from the system under test; `verdict.py` compares that with what was promised.
"""

import sys
from pathlib import Path

# The proxy and the SQL servers are those of the tests, which import each other by their bare names.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
