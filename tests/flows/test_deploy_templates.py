"""The job templates of docs/deploy, against the workers that will read them. No cluster, no Docker."""

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
    """Return the configuration that a worker makes of a template; what it adds for a flow run needs a server."""
    return asyncio.run(worker_class(kind).job_configuration.from_template_and_values(template(kind), values))


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_template_has_what_the_workers_own_has_and_fills_every_place(kind):
    ours, theirs = template(kind), worker_class(kind).get_default_base_job_template()
    assert ours["job_configuration"].keys() == theirs["job_configuration"].keys()
    assert ours["variables"]["properties"].keys() >= theirs["variables"]["properties"].keys()
    places = set(re.findall(r"{{ (\w+) }}", json.dumps(ours["job_configuration"])))
    assert places == ours["variables"]["properties"].keys(), "each variable is used, and each place has one"
    assert not CREDENTIALS & set(re.findall(r"\w+", json.dumps(ours["variables"]["properties"]["env"])))


def test_a_kubernetes_run_asks_for_its_gpus_its_cache_and_time_to_save_a_checkpoint():
    from loraflow.config.runtime import Runtime

    job = rendered("kubernetes", gpus=2, secret="s", cache_claim="c").job_manifest
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["envFrom"] == [{"secretRef": {"name": "s"}}]
    assert pod["terminationGracePeriodSeconds"] > Runtime().grace_seconds
    claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in pod["volumes"]}
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert claims[mounts["/cache"]] == "c"
    assert container["env"]["LORAFLOW_CACHE"] == "/cache" and container["image"] == "loraflow-worker:latest"


def test_a_docker_run_has_a_gpu_its_cache_and_an_init_process():
    made = rendered("docker")
    assert made.volumes == ["loraflow-cache:/cache"] and made.env["LORAFLOW_CACHE"] == "/cache"
    assert made.container_create_kwargs["init"] is True
    [device] = made.container_create_kwargs["device_requests"]
    assert device["Capabilities"] == [["gpu"]]
    docker = pytest.importorskip("docker")
    docker.types.DeviceRequest(**device)  # the client takes it as it is


def test_the_other_nodes_are_an_indexed_job_that_the_cluster_reads_as_it_is_written():
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
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    made = rendered("kubernetes", labels=service["spec"]["selector"])
    made._propagate_labels_to_pod()
    first = made.job_manifest
    claims = [
        {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in some["volumes"]}
        for some in (pod, first["spec"]["template"]["spec"])
    ]
    assert claims[0][mounts["/cache"]] == claims[1]["cache"], "all nodes see one store"
    found = first["spec"]["template"]["metadata"]["labels"]
    assert found.items() >= service["spec"]["selector"].items(), "the Service finds the first node's pod"


def test_each_of_the_other_nodes_runs_the_worker_under_a_number_of_its_own(tmp_path):
    _, job = yaml.safe_load_all((FOLDER / "kubernetes-nodes.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][2:] == ["sh", "-c"]
    (tmp_path / "python").write_text('#!/bin/sh\necho "$LORAFLOW_NODE $@"\n')
    (tmp_path / "python").chmod(0o755)
    file = tmp_path / "job.json"
    file.touch()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB": str(file), "JOB_COMPLETION_INDEX": "1"}
    said = subprocess.run(["sh", "-c", *container["args"]], env=env, capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"2 -m loraflow.execution.worker {file}"


def test_the_image_has_the_extra_that_the_store_needs_and_caches_where_the_pools_mount():
    text = (FOLDER / "Dockerfile").read_text()
    assert "'.[s3]'" in text and "LORAFLOW_CACHE=/cache" in text and "--constraint constraints.txt" in text
    copied = set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE))
    assert copied == {"flows", "tasks", "loraflow", "configs"}
