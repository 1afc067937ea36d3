"""One typed model per owner, loaded from YAML with dotted overrides; imports neither torch nor Ray."""
