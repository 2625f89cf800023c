"""The Prefect tasks: retries, placement, progress and artifacts in the UI. The work is in the modules that they call."""
