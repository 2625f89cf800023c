"""Stages check_dataset, check_general and deal_rows: checks, near-duplicates, the split, and comparisons."""
