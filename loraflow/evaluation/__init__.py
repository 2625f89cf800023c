"""Score a model on held-out rows, and compare models row by row."""
