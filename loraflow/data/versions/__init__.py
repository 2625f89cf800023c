"""Stage version_dataset, and the pins of datasets: DVC, git, the hub and buckets."""
