"""Descriptions of machines are valid where they will be read, and agree with the rest of the repository."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

from gkd_dist.config_file import load_config

KUBERAY = {"rayjob.yaml": "rayjobs", "raycluster.yaml": "rayclusters"}


def closed(schema: Any) -> Any:
    """``schema`` as the Kubernetes API server reads it: an object with named properties has no others.

    (The server drops unknown fields, so that a misspelt one would be lost without a word.)
    """
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        result["additionalProperties"] = False
    return result


def list_map_keys(validator: Any, keys: list[str], instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    """``x-kubernetes-list-map-keys``: items of the list are told apart by these keys."""
    if schema.get("x-kubernetes-list-type") == "map" and isinstance(instance, list):
        seen = [tuple(item.get(key) for key in keys) for item in instance]
        if len(seen) != len(set(seen)):
            yield ValidationError(f"two items have the same {', '.join(keys)}")


def int_or_string(validator: Any, wanted: bool, instance: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
    """``x-kubernetes-int-or-string``."""
    if wanted and not isinstance(instance, int | str):
        yield ValidationError(f"{instance!r} is neither an integer nor a string")


KubernetesValidator = validators.extend(
    Draft202012Validator,
    {"x-kubernetes-list-map-keys": list_map_keys, "x-kubernetes-int-or-string": int_or_string},
)


def problems(schema: dict[str, Any], document: Any) -> list[str]:
    return [
        f"{error.json_path}: {error.message}" for error in KubernetesValidator(closed(schema)).iter_errors(document)
    ]


@pytest.fixture(scope="module")
def documents(root: Path) -> dict[str, Any]:
    return {name: yaml.safe_load((root / "cluster" / "kuberay" / name).read_text()) for name in KUBERAY}


def crd(name: str) -> dict[str, Any]:
    folder = Path(os.environ.get("GKD_DATA", "")) / "crds"
    path = folder / f"ray.io_{KUBERAY[name]}_v1.schema.json"
    if "GKD_DATA" not in os.environ or not path.is_file():
        pytest.skip("needs KubeRay's schemas: set GKD_DATA to a folder with crds/ray.io_*_v1.schema.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_accepts_it(documents: dict[str, Any], name: str) -> None:
    assert problems(crd(name), documents[name]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "shutdownAfterJobFinish"], True),  # misspelt
        (["spec", "backoffLimit"], "two"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "tokens"),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "ports"], [{}]),
        (
            ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env"],
            [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}],
        ),
    ],
)
def test_kuberay_refuses_mistakes(documents: dict[str, Any], path: list[Any], value: Any) -> None:
    wrong = copy.deepcopy(documents["rayjob.yaml"])
    at = wrong
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert problems(crd("rayjob.yaml"), wrong) != []


def test_ray_has_the_version_of_the_lock(documents: dict[str, Any], pins: dict[str, str]) -> None:
    assert documents["raycluster.yaml"]["spec"]["rayVersion"] == pins["ray"]


def test_job_and_cluster_describe_the_same_machines(documents: dict[str, Any]) -> None:
    assert documents["rayjob.yaml"]["spec"]["rayClusterSpec"] == documents["raycluster.yaml"]["spec"]


def test_the_job_makes_one_call_into_launch_with_a_config_that_loads(documents: dict[str, Any], root: Path) -> None:
    script, config, *overrides = shlex.split(documents["rayjob.yaml"]["spec"]["entrypoint"])
    in_image = Path("/opt/gkd")
    assert os.access(root / Path(script).relative_to(in_image), os.X_OK)
    loaded = load_config(root / Path(config).relative_to(in_image), overrides)
    assert loaded.ray.address == "auto"
    workers = documents["rayjob.yaml"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert loaded.distill.num_workers * loaded.distill.gpus_per_worker <= workers["maxReplicas"]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_accepts_it(root: Path, cloud: str) -> None:
    # The schema lies beside Ray's own code; finding it does not import Ray.
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    document = yaml.safe_load((root / "cluster" / "ray-up" / f"{cloud}.yaml").read_text())

    assert [error.message for error in Draft202012Validator(schema).iter_errors(document)] == []
    assert document["head_node_type"] in document["available_node_types"]
    assert document["provider"]["type"] == cloud


def test_machines_run_an_image_that_is_built_here(root: Path) -> None:
    stages = {line.split()[3] for line in (root / "docker" / "Dockerfile").read_text().splitlines() if " AS " in line}
    images = set()
    for path in (root / "cluster").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            key, _, value = line.strip().removeprefix("- ").partition(": ")
            if key == "image":
                images.add(value)
    assert images
    assert {image.partition(":")[0] for image in images} == {"gkd_dist"}
    assert {image.partition(":")[2] for image in images} <= stages


def test_the_slurm_profile_is_sound_shell_and_changes_nothing_unasked(root: Path) -> None:
    lines = (root / "cluster" / "slurm" / "profile.env").read_text().splitlines()
    assigned = {line.split()[1].partition("=")[0] for line in lines if line and not line.startswith("#")}
    script = (root / "launch" / "slurm.sbatch").read_text()
    assert assigned
    assert all(f"${{{name}:-" in script for name in assigned)
