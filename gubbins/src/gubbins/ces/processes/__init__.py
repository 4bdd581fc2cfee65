"""Pilots as processes of a Linux host, with a directory for each: shared by the back ends `local` and `ssh`."""
