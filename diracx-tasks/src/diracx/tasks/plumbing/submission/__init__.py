"""Submission: the choice of the broker for `schedule()`, and the checks and preparation before."""
