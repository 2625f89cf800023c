"""Which answers are learned: marks, labels, verdicts and preference pairs of rows."""
