"""Plain classes that become actors: learner, rollout worker, reward worker, rollout queue."""
