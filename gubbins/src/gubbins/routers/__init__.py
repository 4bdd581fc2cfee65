"""The HTTP interface of the pilot system, below `/api/my_pilots/`."""
