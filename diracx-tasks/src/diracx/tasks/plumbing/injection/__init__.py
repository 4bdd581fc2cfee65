"""Dependency injection for tasks: signatures, plans, placeholders and their providers."""
