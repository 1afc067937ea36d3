"""What a model says of samples."""
