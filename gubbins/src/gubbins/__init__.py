"""Pilot submission system for DiracX: keeps compute elements full of pilots, per VO."""
