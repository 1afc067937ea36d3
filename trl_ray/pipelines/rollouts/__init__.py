"""What pipelines share that train on completions of their own policy."""
