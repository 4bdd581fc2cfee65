"""The tests' own network leaves nothing behind when it is stopped."""

from __future__ import annotations

import gc
import socket

import pytest
from support.network import Network


def test_held_connections_are_closed_when_the_network_stops(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        network = Network(f"redis://127.0.0.1:{server.getsockname()[1]}")
        network.start()
        port = int(network.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            held, _ = server.accept()
            network.hold()
            with held:
                network.stop()
    del network
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
