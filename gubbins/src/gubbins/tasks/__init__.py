"""Tasks of the pilot system."""
