"""The base model: find it, pin it by content, repack it, load it."""
