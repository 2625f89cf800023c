"""Run a stage: build its job, reuse its artifact or compute it in a worker process, and plan a run."""
