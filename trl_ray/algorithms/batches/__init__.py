"""What a step trains on, cut into micro-batches and laid out for the model."""
