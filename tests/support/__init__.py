"""Shared helpers of the tests: servers, sites, fixtures, waiters and recorders."""
