"""How a stage runs under Prefect: cache lookup in the artifact store, retries, placement, progress and reports in the UI."""
