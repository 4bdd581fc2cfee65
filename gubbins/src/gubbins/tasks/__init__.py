"""Tasks of the pilot system, periodic and one-shot."""
