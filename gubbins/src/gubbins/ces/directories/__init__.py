"""Directories of pilots on a host: shared by the back ends that keep one for each pilot."""
