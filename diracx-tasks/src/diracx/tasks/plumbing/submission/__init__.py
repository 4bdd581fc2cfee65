"""Which broker `schedule()` sends to, and what is checked and prepared before."""
