"""Submission: makes and checks the messages of `schedule()`, and binds the broker for them."""
