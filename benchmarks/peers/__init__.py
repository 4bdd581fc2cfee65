"""Benchmarks of other task systems and ours: `make bench-peers`, or `python -m benchmarks.peers --help`.

    controller (this environment)  →  a worker of the peer, started by the peer's own command
                                   →  a client of the peer, which submits: `client.py`

Both run in the peer's own virtual environment and import only its adapter. A worker tells how far it is through
memory that it shares with the controller: `meter.py`.
"""
