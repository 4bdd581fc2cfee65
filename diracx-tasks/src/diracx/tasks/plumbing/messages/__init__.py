"""Encoding of tasks and results: arguments, codec, secrets and errors."""
