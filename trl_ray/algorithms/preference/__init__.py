"""Losses of preferences, with and without a reference, and of reward models."""
