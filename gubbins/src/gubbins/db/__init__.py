"""What the pilot system remembers."""
