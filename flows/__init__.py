"""What runs, and in which order. No stage logic, no torch."""
