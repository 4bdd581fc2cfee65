"""The task system of DiracX."""
