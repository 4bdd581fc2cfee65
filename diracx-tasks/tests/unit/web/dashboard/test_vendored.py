"""Vendored files of the dashboard have the checksums of their review."""

from __future__ import annotations

import hashlib

from diracx.tasks.web.dashboard.rendering import STATIC
from support.paths import ROOT

VENDORED = STATIC / "vendor"


def test_every_vendored_file_has_the_checksum_that_is_pinned_and_no_other_is_there() -> None:
    lines = (VENDORED / "SHA256SUMS").read_text().splitlines()
    pinned = {name: digest for digest, name in (line.split() for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDORED.iterdir()}
    del found["SHA256SUMS"]
    assert found == pinned


def test_vendored_files_are_verified_when_they_are_fetched_again() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\nvendor:")[2].partition("\n\n")[0]
    assert "sha256sum --strict --check" in recipe
    assert recipe.index("npm pack") < recipe.index("sha256sum") < recipe.index('"$(CURDIR)/$(VENDORED)/"')
