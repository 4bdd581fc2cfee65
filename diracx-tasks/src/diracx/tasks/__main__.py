"""Command line as `python -m diracx.tasks`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
