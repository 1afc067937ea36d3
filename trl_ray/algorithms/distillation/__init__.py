"""Losses of distillation and self-distillation, and what they ask of teachers."""
