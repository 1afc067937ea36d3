"""Policy optimisation: advantages, samples of groups, the policy objective."""
