"""Models beside the policy: references and teachers."""
