"""Fuzzed readers: files from outside, mutated. A reader may refuse a file with a Failure, and must not do anything else."""
