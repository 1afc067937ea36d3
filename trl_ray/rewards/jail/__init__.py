"""Walls around processes that score what a model wrote."""
