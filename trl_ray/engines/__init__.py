"""Inference engines behind one protocol: real vLLM, and transformers as numerical reference."""
