"""Loading, wrapping, publishing and checkpointing models."""
