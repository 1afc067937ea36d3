"""What all runs share: their life, plan, learner and record."""
