"""Text and pictures of reports, without Prefect."""
