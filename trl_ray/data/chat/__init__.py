"""Chat templates, and what is written with them."""
