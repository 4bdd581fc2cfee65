"""Pilot states, rules of compute elements, errors and the clock: what every other layer is built on."""
