"""Metrics of processes, as they are exported: by HTTP for Prometheus, by OpenTelemetry's SDK to a file."""

from __future__ import annotations

__all__ = ["SDK", "exported", "get", "install_site", "samples", "series"]

import json
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from support.distributions import install_distribution

#: Sets up the SDK, as a site may do for its workers. Here it writes to a file.
SDK = """
import os
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

out = open(os.environ["EXPORTED"] + str(os.getpid()), "w")
exporter = ConsoleMetricExporter(out=out, formatter=lambda data: data.to_json(indent=None) + chr(10))
metrics.set_meter_provider(MeterProvider(metric_readers=[PeriodicExportingMetricReader(exporter)]))
"""


#: Collector of another distribution. Its metric has neither of the two types of those of this package.
_OF_A_SITE = """
from contextlib import asynccontextmanager
from prometheus_client.core import UnknownMetricFamily


@asynccontextmanager
async def site():
    async def collect():
        return [UnknownMetricFamily("site_weight", "Weight of the site.", value=2.5)]

    yield collect
"""


def install_site(directory: Path) -> None:
    """Install the distribution of a site, with a metric `site_weight`, in a directory."""
    install_distribution(directory, "site_metrics", _OF_A_SITE, {"diracx.tasks_metrics": "site = site"})


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body; 0 if nothing is listening."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except ConnectionError:
        return 0, ""
    finally:
        connection.close()


def samples(text: str) -> dict[str, float]:
    """Name and labels (in alphabetical order) -> value, each once."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        for sample in family.samples:
            which = series(sample.name, **sample.labels)
            assert which not in found, which
            found[which] = sample.value
    return found


def series(name: str, **labels: str) -> str:
    """Name and labels as the keys of `samples`."""
    inside = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inside}}}" if labels else name


def exported(directory: Path, pid: int) -> dict[str, list[dict[str, Any]]]:
    """Name of each metric -> its data points, of the last export."""
    path = directory / f"exported{pid}"
    lines = path.read_text().splitlines() if path.exists() else []
    complete = [line for line in lines if line.endswith("}")]
    if not complete:
        return {}
    return {
        metric["name"]: metric["data"]["data_points"]
        for resource in json.loads(complete[-1])["resource_metrics"]
        for scope in resource["scope_metrics"]
        if scope["scope"]["name"].startswith("diracx.tasks")
        for metric in scope["metrics"]
    }
