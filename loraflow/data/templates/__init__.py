"""Chat templates: rendering, special tokens, and where answers are in a rendered chat."""
