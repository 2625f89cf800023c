"""The train stage: train an adapter with trl's SFTTrainer. `train.run` is the entry point.

- What to train: `setup` (all inputs of a training: steps and order of rows, trl's SFTConfig).
- How to train on this machine: `train.build_trainer` with `choices` (attention, sharding, engine), `memory` (size of
  micro-batches, recomputation, what a retry lowers), `base_model` (load the base, initialise the adapter), `fast_engine` or
  `stock_engine`. `document_check` refuses a model in which tokens see what they should not. `preview` says all this for a
  base that is not loaded.
- The loop: transformers' own. It calls `trainer.FastTrainer.training_step`, which reads `batches.StepDataset` (rows to
  micro-batches, with `collation`). `callbacks` log, check and save.
- The computation: `attention` and `flash4`, `lora_kernels` and `frozen_linear`, `loss_head`, `layers` (compile, recompute),
  `cuda_graphs`.
- Several trials of a sweep over one base: `train_group`, with `group_batches`, `group_lora` and `group_trainer`.
"""
