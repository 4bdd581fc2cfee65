"""Vendored files of the dashboard have the checksums of their review."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diracx.tasks.web.dashboard.rendering import STATIC

VENDORED = STATIC / "vendor"


def test_every_vendored_file_has_the_checksum_that_is_pinned_and_no_other_is_there() -> None:
    lines = (VENDORED / "SHA256SUMS").read_text().splitlines()
    pinned = {name: digest for digest, name in (line.split() for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDORED.iterdir()}
    del found["SHA256SUMS"]
    assert found == pinned


def test_what_is_fetched_again_is_verified_before_it_is_taken_in() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    recipe = makefile.partition("\nvendor:")[2].partition("\n\n")[0]
    assert "sha256sum --strict --check" in recipe
    assert recipe.index("npm pack") < recipe.index("sha256sum") < recipe.index('"$(CURDIR)/$(VENDORED)/"')
