"""Connections to sites: local commands, SSH, and tokens."""
