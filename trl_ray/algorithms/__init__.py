"""Pure maths of post-training: log-probs, advantages, losses, batching and layout."""
