"""Task system of DiracX."""
