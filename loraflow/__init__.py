"""LoRA fine-tuning as a pipeline of cached stages. Start with `docs/design.md`: words, layers, the way through the code."""

__version__ = "0.1.0"
