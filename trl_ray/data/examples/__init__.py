"""From records to what the learner trains on."""
