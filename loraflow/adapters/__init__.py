"""LoRA adapters: put them into a model, merge them into its weights, prove that the two are the same."""
