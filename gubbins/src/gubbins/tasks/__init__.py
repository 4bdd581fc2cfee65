"""The periodic and one-shot tasks of the pilot system."""
