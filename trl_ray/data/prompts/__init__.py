"""What rollout workers, reward models and teachers are asked."""
