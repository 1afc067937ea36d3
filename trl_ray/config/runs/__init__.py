"""Options of whole runs, one model per pipeline."""
