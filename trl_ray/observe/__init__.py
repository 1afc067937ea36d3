"""What a run shows of itself: metrics, the run directory, sinks, traces, completions and the report."""
