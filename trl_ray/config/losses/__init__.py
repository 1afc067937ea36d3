"""Options of losses, one section per loss."""
