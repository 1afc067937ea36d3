"""Post-training of language models on Ray actors, with the arguments and conventions of TRL."""
