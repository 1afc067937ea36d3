"""One module per pipeline: which actors it needs, and the loops that join them."""
