"""Plot the results of `benchmarks.pilot_scale`: `python -m benchmarks.pilot_plot DIRECTORY < figures.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

NAME = "pilots-scale"
PARTS = (
    ("check_seconds", "check", "#3b6ea5"),
    ("submit_seconds", "submit", "#c0392b"),
    ("ask_seconds", "ask", "#7f8c8d"),
)


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "diracx-tasks"  # the same figures give the same file
    directory, found = Path(sys.argv[1]), json.load(sys.stdin)
    cycles: list[dict[str, Any]] = found["cycles"]
    minutes = [cycle["minute"] for cycle in cycles]

    def values(name: str) -> list[float]:
        return [cycle[name] for cycle in cycles]

    figure = Figure(figsize=(13, 7.2))
    (held, shares), (times, costs) = figure.subplots(2, 2)
    held.plot(minutes, values("active"), color="#3b6ea5", label="active pilots")
    held.axhline(found["capacity"], color="#c0392b", linestyle="--", linewidth=1, label="slots")
    held.set_ylim(found["capacity"] * 0.9, found["capacity"] * 1.01)
    held.set_title("slots in use", fontsize=10, loc="left")
    for least, most, alpha, label in (
        ("smallest_at_ce", "largest_at_ce", 0.2, "at a single compute element"),
        ("smallest_share", "largest_share", 0.6, "in all"),
    ):
        shares.fill_between(minutes, values(least), values(most), color="#3b6ea5", alpha=alpha, label=label)
    shares.axhline(1, color="#c0392b", linestyle="--", linewidth=1)
    shares.set_ylim(0.8, 1.2)
    shares.set_title("share of a VO, least to most, 1 is even", fontsize=10, loc="left")
    times.stackplot(
        minutes, *(values(name) for name, _, _ in PARTS), labels=[label for _, label, _ in PARTS],
        colors=[colour for _, _, colour in PARTS],
    )  # fmt: skip
    times.set_title("seconds for a cycle of one minute", fontsize=10, loc="left")
    costs.plot(minutes, values("memory_mb"), color="#3b6ea5", label="memory, MB, the most so far")
    costs.plot(minutes, values("statements"), color="#c0392b", label="statements beside submissions")
    costs.set_ylim(bottom=0)
    costs.set_title("memory and statements", fontsize=10, loc="left")
    for axes in (held, shares, times, costs):
        axes.set_xlabel("simulated minute", fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in (held, shares, times, costs):
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(directory / f"{NAME}.svg", metadata={"Date": None})
    print(NAME)


if __name__ == "__main__":
    main()
