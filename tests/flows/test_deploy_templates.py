"""The job templates of docs/deploy, read by the classes of Prefect's workers. No cluster, no Docker."""

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parent.parent.parent / "docs" / "deploy"
CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def worker_class(kind: str) -> Any:
    if kind == "docker":
        return pytest.importorskip("prefect_docker.worker").DockerWorker
    return pytest.importorskip("prefect_kubernetes.worker").KubernetesWorker


def template(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{kind}-pool.json").read_text())


def rendered(kind: str, **values: Any) -> Any:
    """Return the configuration that a worker derives from a template, without what it adds for a flow run."""
    return asyncio.run(worker_class(kind).job_configuration.from_template_and_values(template(kind), values))


def claims_of(pod: dict[str, Any]) -> dict[str, str | None]:
    """Return the persistent volume claims of a pod's volumes, by the volume's name."""
    return {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_template_has_the_default_templates_keys_and_uses_every_variable(kind):
    found, prefects = template(kind), worker_class(kind).get_default_base_job_template()
    assert found["job_configuration"].keys() == prefects["job_configuration"].keys()
    assert found["variables"]["properties"].keys() >= prefects["variables"]["properties"].keys()
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(found["job_configuration"])))
    assert used == found["variables"]["properties"].keys(), "each variable is used, and each used variable exists"
    assert not CREDENTIALS & set(re.findall(r"\w+", json.dumps(found["variables"]["properties"]["env"])))


def test_a_kubernetes_run_requests_gpus_a_cache_and_time_to_save_a_checkpoint():
    from loraflow.config.runtime import Runtime

    job = rendered("kubernetes", gpus=2, secret="s", cache_claim="c").job_manifest
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["envFrom"] == [{"secretRef": {"name": "s"}}]
    assert pod["terminationGracePeriodSeconds"] > Runtime().grace_seconds
    claims = claims_of(pod)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert claims[mounts["/cache"]] == "c"
    assert container["env"]["LORAFLOW_CACHE"] == "/cache" and container["image"] == "loraflow-worker:latest"


def test_a_docker_run_has_a_gpu_a_cache_and_an_init_process():
    run = rendered("docker")
    assert run.volumes == ["loraflow-cache:/cache"] and run.env["LORAFLOW_CACHE"] == "/cache"
    assert run.container_create_kwargs["init"] is True
    [device] = run.container_create_kwargs["device_requests"]
    assert device["Capabilities"] == [["gpu"]]
    docker = pytest.importorskip("docker")
    docker.types.DeviceRequest(**device)  # the client accepts it unchanged


def test_the_indexed_job_of_the_other_nodes_is_read_by_the_kubernetes_api_without_loss():
    client = pytest.importorskip("kubernetes_asyncio.client")
    service, job = yaml.safe_load_all((FOLDER / "kubernetes-nodes.yaml").read_text())

    async def read_and_written(document: dict[str, Any], kind: str) -> Any:
        async with client.ApiClient(client.Configuration()) as api:
            return api.sanitize_for_serialization(api._ApiClient__deserialize(document, kind))

    for document, kind in ((service, "V1Service"), (job, "V1Job")):
        assert asyncio.run(read_and_written(document, kind)) == document, "a key that the API lacks would be lost"
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    run = rendered("kubernetes", labels=service["spec"]["selector"])
    run._propagate_labels_to_pod()
    first = run.job_manifest
    first_claims = claims_of(first["spec"]["template"]["spec"])
    assert claims_of(pod)[mounts["/cache"]] == first_claims["cache"], "all nodes see one store"
    found = first["spec"]["template"]["metadata"]["labels"]
    assert found.items() >= service["spec"]["selector"].items(), "the Service finds the first node's pod"


def test_each_other_node_runs_the_worker_with_its_node_number(tmp_path):
    _, job = yaml.safe_load_all((FOLDER / "kubernetes-nodes.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][2:] == ["sh", "-c"]
    (tmp_path / "python").write_text('#!/bin/sh\necho "$LORAFLOW_NODE $@"\n')
    (tmp_path / "python").chmod(0o755)
    file = tmp_path / "job.json"
    file.touch()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB": str(file), "JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run(["sh", "-c", *container["args"]], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"2 -P -m loraflow.execution.worker {file}"


def test_the_image_has_the_extra_that_the_store_needs_and_caches_where_the_pools_mount():
    text = (FOLDER / "Dockerfile").read_text()
    assert "'.[s3]'" in text and "LORAFLOW_CACHE=/cache" in text and "--constraint constraints.txt" in text
    copied = set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE))
    assert copied == {"flows", "tasks", "loraflow", "configs"}


def test_the_image_runs_as_a_user_that_kubernetes_can_tell_from_root():
    text = (FOLDER / "Dockerfile").read_text()
    [user] = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert user.isdigit() and int(user) > 0 and f"--uid {user} " in text
