"""The `trl-ray` command."""
