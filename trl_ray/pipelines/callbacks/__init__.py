"""Callbacks of users: hooks, loading, states."""
