"""The language-model head: log-probs, entropies and divergences without `[tokens, vocabulary]`."""
