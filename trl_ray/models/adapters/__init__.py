"""LoRA adapters: made, read, merged."""
