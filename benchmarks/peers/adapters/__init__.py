"""One module for each peer: its tasks, as its own worker loads them, and `client()`, which submits them.

The same tasks everywhere:

- `noop(number)` does nothing; `return_one(number)` returns 1, for workers that store results;
- `nap(number)` sleeps 10 ms;
- `clock(sent)` notes the time since `sent`, on the monotonic clock; `due(moment)` that since `moment`, of the wall
  clock (negative: early);
- `mutex(number)` is a no-op that takes a mutex of its own; `alone(number)` works 1 ms behind one mutex for all.
"""
