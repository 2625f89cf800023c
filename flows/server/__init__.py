"""The server side of Prefect: deployments, automations, local servers, runs that lost their worker."""
