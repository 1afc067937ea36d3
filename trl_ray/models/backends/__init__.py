"""Gradients summed, clipped and applied: torch and DeepSpeed."""
