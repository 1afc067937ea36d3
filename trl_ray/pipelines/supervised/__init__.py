"""What pipelines share that train on datasets."""
