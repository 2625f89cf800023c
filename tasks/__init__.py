"""How a stage runs under Prefect: cache key, retries, progress, artifacts in the UI."""
