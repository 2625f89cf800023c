"""Use a model: talk to it."""
