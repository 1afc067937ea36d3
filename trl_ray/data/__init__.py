"""Prompts: where rows come from, what is checked before a run starts, and how they become token ids."""
