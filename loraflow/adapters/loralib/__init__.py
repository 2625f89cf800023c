"""Training with Microsoft's loralib: its layers in a pretrained model, its checkpoints, and the way to a PEFT adapter."""
