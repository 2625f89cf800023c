"""The job variables of a deployment. Prefect ignores those that the template of the work pool does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.client.schemas.objects import WorkPool
from prefect.utilities.templating import find_placeholders
from prefect.workers.process import ProcessWorker

from loraflow.failures import BadConfig
from loraflow.flows.server.deployment_spec import DeploymentSpec


def refuse_ignored_job_variables(spec: DeploymentSpec, pool: WorkPool | None) -> None:
    """Check the job variables of a deployment against the job template of its work pool.

    Args:
        spec: the deployment.
        pool: its work pool on the server; None if `loraflow deploy` will create it, of type process.

    Raises:
        BadConfig: the template does not know a variable, such as `image` in a pool of type process.
    """
    known = _known(pool)
    if known is None or not (ignored := sorted(spec.work_pool.job_variables.keys() - known)):
        return
    name, kind = spec.work_pool.name, pool.type if pool else "process"
    create = f"prefect work-pool create {name} --type docker (or kubernetes), then `loraflow deploy`"
    raise BadConfig(
        f"The work pool {name} has no such job variables, so Prefect would ignore them.",
        where=f"prefect.yaml: {spec.full_name}.work_pool.job_variables",
        expected=f"of a pool of type {kind}: {', '.join(sorted(known))}",
        got=", ".join(ignored),
        next_step="remove them from prefect.yaml"
        + ("" if pool else f"; or create a pool of another type first: {create}"),
    )


def _known(pool: WorkPool | None) -> set[str] | None:
    """Return the names of the job variables of a pool; None if the server does not have its template yet."""
    template: Mapping[str, Any] = (pool.base_job_template if pool else None) or {}
    if not template and (pool is None or pool.type == "process"):
        template = ProcessWorker.get_default_base_job_template()
    if not template:  # its first worker sets it
        return None
    return set(template.get("variables", {}).get("properties", {})) | {
        placeholder.name for placeholder in find_placeholders(template.get("job_configuration", {}))
    }
