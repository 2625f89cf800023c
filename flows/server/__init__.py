"""Administration of a Prefect server, by task.

- `loraflow deploy`: `deployments` creates and updates what `prefect_yaml` reads from prefect.yaml; `automations` are the
  server's automations; `connection` checks the server and its workers.
- `loraflow up`: `local_server` starts a server and workers on this machine; `end_abandoned` in `automations` ends the runs
  that an earlier `loraflow up` left unfinished.
- a deployment's pull step: `project`.

No process may outlive its parent (`loraflow.execution.parent_death`): `prefect_process` wraps the server and workers of
`loraflow up`, and the temporary server of a single command, which `temporary_server` starts.
"""
