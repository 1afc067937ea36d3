"""Rows of any known convention, turned into records."""
