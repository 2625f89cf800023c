"""LoRA fine-tuning as a pipeline of cached stages. `docs/design.md` explains the words, the layers and the way through the code."""

__version__ = "0.1.0"
