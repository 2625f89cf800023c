"""Text and charts of reports, without Prefect."""
