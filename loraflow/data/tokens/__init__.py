"""Stage tokenize: token ids, labels, packing and their files."""
