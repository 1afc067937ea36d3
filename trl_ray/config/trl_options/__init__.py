"""Options of TRL, transformers and their neighbours that are none here: read into ours, accepted, or refused."""
