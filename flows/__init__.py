"""The flows: which tasks run, and in which order. The work of the stages is in `loraflow/`; nothing here imports torch."""
