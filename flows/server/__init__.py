"""Administration of a Prefect server, by task.

- `loraflow deploy`: `deployments` creates and updates what `prefect_yaml` reads from prefect.yaml; `automations` are the
  server's automations; `connection` checks the server and its workers.
- `loraflow up`: `local_server` starts a server and workers on this machine; `end_abandoned` in `automations` ends the runs
  that an earlier `loraflow up` left unfinished.
- a deployment's pull step: `project`.

No process may outlive its parent, even if the parent is killed by SIGKILL:

- `prefect_process` wraps the server and workers of `loraflow up`. They end with `loraflow up`. The transactions of that
  server, and of a temporary one, wait in turn.
- `temporary_server` starts Prefect's temporary server for a single command; `watchdog`, a process of its own, ends that
  server when the command is gone.
- `loraflow.execution.parent_death` ends a process group when its parent is gone; `prefect_process` and the worker
  processes of stages use it.
"""
