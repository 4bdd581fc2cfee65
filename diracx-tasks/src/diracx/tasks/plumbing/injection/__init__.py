"""Dependency injection for tasks: signatures, plans, providers and the placeholders that stand for them."""
