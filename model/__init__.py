"""Model checker of the delivery protocol: every interleaving of two workers and failures.

`make model`, or `python -m model --help`. Workers are modelled (`steps.py`); the server is a real one and runs the
real scripts (`server.py`); `search.py` visits every state within a number of disturbances.
"""
