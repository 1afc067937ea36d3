"""How engines start: what they are told beside the options, and what is said when they cannot."""
