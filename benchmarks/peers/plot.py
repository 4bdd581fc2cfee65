"""Plot the output of `--json`: `python plot.py DIRECTORY < figures.json`, in the environment `plot`.

Bars on a logarithmic scale, for the contestants are orders of magnitude apart.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

OURS, LIMIT, OTHER = "#c0392b", "#b8b8b8", "#3b6ea5"
#: File -> panels: title and figure.
PLOTS = {
    "peers-throughput": [
        ("drain of no-ops, tasks/s", "drain"),
        ("drain, a mutex each, tasks/s", "mutex"),
        ("drain, results stored, tasks/s", "results"),
        ("submit in bulk, tasks/s", "bulk"),
    ],
    "peers-latency": [
        ("latency p50, ms", "latency_p50"),
        ("latency p99, ms", "latency_p99"),
        ("start to first task, s", "start"),
        ("Redis bytes per queued task", "queued_bytes"),
    ],
}


def panel(axes: Any, title: str, figure: str, peers: dict[str, Any]) -> None:
    bars = [
        (peer["title"], peer["figures"][figure]["median"], name)
        for name, peer in peers.items()
        if figure in peer["figures"] and peer["figures"][figure]["median"] > 0
    ]
    bars.sort(key=lambda bar: bar[1])
    colours = [OURS if name == "ours" else LIMIT if name.startswith("bare") else OTHER for _, _, name in bars]
    drawn = axes.barh([title for title, _, _ in bars], [value for _, value, _ in bars], color=colours)
    labels = [f" {value:,.0f}" if value >= 100 else f" {value:.3g}" for _, value, _ in bars]
    axes.bar_label(drawn, labels=labels, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(bars[0][1] / 2)), bars[-1][1] * 3)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "diracx-tasks"  # the same figures give the same file
    directory, peers = Path(sys.argv[1]), json.load(sys.stdin)["peers"]
    for name, panels in PLOTS.items():
        wanted = [each for each in panels if any(each[1] in peer["figures"] for peer in peers.values())]
        if not wanted:
            continue
        lines = (len(wanted) + 1) // 2
        figure = Figure(figsize=(13, 3.6 * lines))
        every = list(figure.subplots(lines, 2, squeeze=False).flat)
        for axes, (title, key) in zip(every, wanted, strict=False):
            panel(axes, title, key, peers)
        for axes in every[len(wanted) :]:
            axes.remove()
        figure.tight_layout()
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        print(name)


if __name__ == "__main__":
    main()
