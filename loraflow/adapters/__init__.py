"""LoRA adapters: create them for training, merge them into a base model, verify the merge, convert their format.

Modules, by purpose:

- training: `lora_config` (the recipe's settings as peft's, with checks), `variants` (PiSSA, OLoRA, EVA, LoftQ, LoRA+),
  `loralib/` (training with Microsoft's loralib instead of peft)
- accepting an adapter: `validation` asks whether it is complete (`completeness`), and whether its
  vocabulary (`vocabulary`), its tokenizer and its template (`tokenizer_files`) go with the base
- merging: `merge` (the stage) calls `merge_folders`, which checks the adapter and chooses the way to merge:
  `merge_plan` reads what the adapter changes, and `streaming_merge` computes it from disk to disk; what that cannot do
  goes through `merge_with_peft`. Of adapters that were trained on an NF4 base (`nf4`), `merge` compares two merges.
- verification: `verify` (the stage), with `logits`
- conversion: `convert` reads loralib's checkpoints or a `peft_folder`, and `fit_to_base` splits or fuses projections
- what they share: `adapter_config`, `lora_updates`
"""
