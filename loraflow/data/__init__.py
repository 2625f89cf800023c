"""Datasets: DVC pins, file and chat formats, checks and the split, chat template and loss mask, tokenization, packing."""
