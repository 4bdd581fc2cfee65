"""The demo: a whole pilot system on this machine, from an empty directory."""
