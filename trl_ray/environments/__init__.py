"""What a policy acts in beyond one answer: tools and conversations of several turns."""
