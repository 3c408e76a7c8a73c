"""The files that start clusters and nights are ones that Ray and KubeRay accept."""

import json
import os
import re
import shlex
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.awsrequest import AWSResponse

from darnet.settings import ScoreSettings, read_settings
from tests.iam import is_allowed
from tests.places import ROOT

README = (ROOT / "README.md").read_text()
CLUSTER_TEXT = (ROOT / "cluster.yaml").read_text()
NIGHTLY_TEXT = (ROOT / "jobs" / "nightly.yaml").read_text()
NIGHTLY: dict[str, Any] = yaml.safe_load(NIGHTLY_TEXT)
JOB = NIGHTLY["spec"]["jobTemplate"]
WORKERS = {group["groupName"]: group for group in JOB["rayClusterSpec"]["workerGroupSpecs"]}

# Source: KubeRay 1.6, API reference of ray.io/v1: what may stand where, and what must (first).
JOB_FIELDS = (
    {"rayClusterSpec": dict},
    {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "submissionMode": str,
        "submitterConfig": dict,
        "submitterPodTemplate": dict,
        "entrypointNumCpus": float,
    },
)
CLUSTER_FIELDS = (
    {"headGroupSpec": dict},
    {
        "rayVersion": str,
        "authOptions": dict,
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": dict,
        "workerGroupSpecs": list,
    },
)
HEAD_FIELDS = {"template": dict}, {"rayStartParams": dict, "serviceType": str}
WORKER_FIELDS = (
    {"groupName": str, "template": dict, "minReplicas": int, "maxReplicas": int},
    {
        "replicas": int,
        "rayStartParams": dict,
        "numOfHosts": int,
    },
)
# Source: Kubernetes 1.33, API reference of core/v1: of a pod's fields those that ours must have (first) or may have use
# for.
POD_FIELDS = (
    {"serviceAccountName": str, "enableServiceLinks": bool, "containers": list},
    {"tolerations": list, "nodeSelector": dict, "imagePullSecrets": list, "volumes": list},
)
CONTAINER_FIELDS = (
    {"name": str, "image": str, "env": list, "resources": dict},
    {"imagePullPolicy": str, "volumeMounts": list},
)
TOLERATION_FIELDS = {"key": str, "operator": str, "effect": str}, {"value": str, "tolerationSeconds": int}


def _read_cluster() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(CLUSTER_TEXT)
    return document


def _read_own_machines() -> dict[str, Any]:
    """The cluster file with its last comment in place of what the comment says it replaces."""
    replaced = ("max_workers", "provider", "auth", "available_node_types", "head_node_type")
    return {key: value for key, value in _read_cluster().items() if key not in replaced} | _read_comment(-1)


def _read_with_keys() -> dict[str, Any]:
    """The cluster file with the comment about keys in place of the same lines."""
    lines = _read_comment(-2)
    assert set(lines) == {"file_mounts", "head_start_ray_commands", "worker_start_ray_commands"}
    return _read_cluster() | lines


def _read_comment(place: int) -> dict[str, Any]:
    """What one of the file's closing comments says, as YAML."""
    block = re.split(r"^#\n", CLUSTER_TEXT, flags=re.M)[place].partition("\n\n")[0]
    document: dict[str, Any] = yaml.safe_load(re.sub(r"^# ?", "", block, flags=re.M))
    return document


def _assert_fields(given: dict[str, Any], fields: tuple[dict[str, type], dict[str, type]]) -> None:
    required, optional = fields
    assert set(required) <= set(given) <= set(required) | set(optional)
    assert {name for name, value in given.items() if type(value) is not (required | optional)[name]} == set()


def _assert_pod_fields(pod: dict[str, Any]) -> None:
    _assert_fields(pod, POD_FIELDS)
    assert pod["serviceAccountName"] == "darnet-scorer"
    assert pod["enableServiceLinks"] is False
    for toleration in pod.get("tolerations", []):
        _assert_fields(toleration, TOLERATION_FIELDS)
    for container in pod["containers"]:
        _assert_fields(container, CONTAINER_FIELDS)
        assert set(container["resources"]) == {"requests", "limits"}
        assert container["resources"]["requests"] == container["resources"]["limits"]  # else it may be evicted first
        assert set(container["resources"]["limits"]) <= {"cpu", "memory", "nvidia.com/gpu"}


@pytest.mark.parametrize("read", [_read_cluster, _read_own_machines, _read_with_keys])
def test_cluster_file_follows_rays_schema(read: Any) -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(), schema)


def test_the_head_does_no_work_and_other_nodes_are_spot() -> None:
    nodes = _read_cluster()["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert nodes["decode"]["resources"].get("GPU", 0) == 0
    assert nodes["gpu"]["resources"]["GPU"] == 1
    for name in ("decode", "gpu"):
        assert nodes[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert _read_cluster()["max_workers"] >= nodes["decode"]["max_workers"] + nodes["gpu"]["max_workers"]


def test_every_type_of_node_names_its_image_and_disk() -> None:
    """Ray's own default is an Ubuntu without the Python that the setup commands call; an Ubuntu's disk has 8 GB."""
    for kind in _read_cluster()["available_node_types"].values():
        assert "ImageId" in kind["node_config"]
        (disk,) = kind["node_config"]["BlockDeviceMappings"]
        assert disk["DeviceName"] == "/dev/sda1"
        assert disk["Ebs"]["VolumeSize"] >= 100
        assert disk["Ebs"]["VolumeType"] == "gp3"


def test_the_head_alone_has_the_role_that_starts_nodes() -> None:
    """Ray makes no role of its own for a head that names one. What the README's policies allow, test_readme tells."""
    nodes = _read_cluster()["available_node_types"]
    roles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in nodes.items()}
    assert roles == {"head": "darnet-head", "decode": "darnet-scorer", "gpu": "darnet-scorer"}


@pytest.mark.ray  # which only needs to be importable
def test_the_head_may_do_to_ec2_what_rays_autoscaler_asks_of_it() -> None:
    """Ray's own code on this file, with boto3's own client, whose requests are answered before they leave."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

    document = _read_cluster()
    provider = AWSNodeProvider(document["provider"], document["cluster_name"])
    tags: list[dict[str, str]] = []
    asked: dict[str, dict[str, Any]] = {}

    def answer(model: Any, params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        asked[model.name] = params["body"]
        nodes = [{"InstanceId": "i-1", "State": {"Name": "running"}, "Tags": tags}]
        told = {"RunInstances": {"Instances": nodes}, "DescribeInstances": {"Reservations": [{"Instances": nodes}]}}
        return AWSResponse("https://ec2", 200, {}, None), told.get(model.name, {})

    for resource in (provider.ec2, provider.ec2_fail_fast):
        resource.meta.client.meta.events.register("before-call.ec2", answer)
    kind = document["available_node_types"]["gpu"]
    new = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_CONFIG: "0"}
    (node,) = provider.create_node({**kind["node_config"], "SubnetIds": ["subnet-1"]}, new, 1)
    assert provider.non_terminated_nodes({}) == [node]
    provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "up-to-date"})
    provider.terminate_node(node)
    provider.terminate_nodes([node])
    started = asked["RunInstances"]
    assert (started["IamInstanceProfile.Name"], started["BlockDeviceMapping.1.Ebs.VolumeSize"]) == (
        "darnet-scorer",
        140,
    )
    marks = {
        f"aws:ResourceTag/{started[name]}": started[name.replace("Key", "Value")] for name in started if ".Key" in name
    }

    policy = json.loads(re.findall(r"```json\n(.*?)```", README, re.S)[3])
    instance = "arn:aws:ec2:eu-central-1:123456789012:instance/i-1"
    role = "arn:aws:iam::123456789012:role/darnet-scorer"
    assert len(asked) == 4
    for name in asked:
        assert is_allowed(policy, f"ec2:{name}", instance, marks), name
    assert is_allowed(policy, "ec2:CreateTags", instance, {"ec2:CreateAction": "RunInstances"})
    assert is_allowed(policy, "iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"})
    assert not is_allowed(policy, "ec2:TerminateInstances", instance, {"aws:ResourceTag/ray-cluster-name": "other"})
    assert not is_allowed(policy, "ec2:CreateTags", instance)
    for other in ("darnet-head", "admin"):
        assert not is_allowed(policy, "iam:PassRole", role.replace("darnet-scorer", other))


def test_a_node_that_is_added_later_gets_the_same_code(tmp_path: Path) -> None:
    """The clone of the setup commands, from a repository whose branch has gone on since the tag was set; twice."""
    (clone,) = [line for line in _read_cluster()["setup_commands"] if "git clone" in line]
    origin = tmp_path / "origin"
    commit = f"git -C {origin} -c user.name=a -c user.email=a commit -q --allow-empty -m"
    tag = f"git -C {origin} tag v0.1.0"
    for line in (f"git init -q {origin}", f"{commit} old", f"{commit} then", tag, f"{commit} later"):
        subprocess.run(shlex.split(line), check=True)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    line = clone.replace("https://git.example.org/radiology/darnet.git", origin.as_uri())
    for _ in range(2):
        subprocess.run(["bash", "-c", line], env=environment, check=True, capture_output=True)
        told = ["git", "-C", str(tmp_path / "darnet"), "log", "-1", "--format=%s"]
        assert subprocess.run(told, check=True, capture_output=True, text=True).stdout == "then\n"
    assert version("darnet") == "0.1.0"  # what the tag is named by


def test_own_machines_are_counted() -> None:
    document = _read_own_machines()
    assert document["provider"]["type"] == "local"
    assert document["max_workers"] == len(document["provider"]["worker_ips"])


@pytest.mark.parametrize("read", [_read_cluster, _read_with_keys])
@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_asks_for_a_token(commands: str, read: Any) -> None:
    assert all("RAY_AUTH_MODE=token" in line for line in read()[commands] if "ray start" in line)


@pytest.mark.parametrize("read", [_read_cluster, _read_with_keys])
def test_only_the_head_itself_reaches_the_dashboard(read: Any) -> None:
    (start,) = [line for line in read()["head_start_ray_commands"] if "ray start" in line]
    assert re.findall(r" --dashboard-host[= ](\S+)", start) == ["127.0.0.1"]


def test_cron_finds_what_the_cluster_file_installs() -> None:
    """The README's lines, against the user, the clone and the environment of the head on EC2."""
    path, mode, line = re.findall(r"^    (PATH=.*|RAY_AUTH_MODE=.*|30 1 \* \* \* .*)$", README, re.M)
    user, command = line.split(maxsplit=6)[5:]
    home = f"/home/{_read_cluster()['auth']['ssh_user']}"
    assert (f"/home/{user}", mode) == (home, "RAY_AUTH_MODE=token")
    setup = " ".join(_read_cluster()["setup_commands"])
    assert "~/venv/bin/pip install" in setup
    assert path.startswith(f"PATH={home}/venv/bin:")
    assert "darnet.git ~/darnet" in setup
    script, *flags = shlex.split(command)
    assert script == f"{home}/darnet/jobs/night.sh"
    assert os.access(ROOT / "jobs" / "night.sh", os.X_OK)
    assert "%" not in line  # cron would make a line's end of it
    settings = read_settings(ScoreSettings, flags, "x")
    assert (settings.score.device, settings.settle_s) == ("gpu", 1800)


def test_the_recipe_makes_a_token_before_the_cluster_copies_it() -> None:
    recipe = README.partition("## On a cluster")[2]
    assert 0 < recipe.index("ray get-auth-token --generate") < recipe.index("ray up cluster.yaml")


@pytest.mark.parametrize(("read", "key"), [(_read_cluster, ""), (_read_with_keys, "secret")])
@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_jobs_of_the_cluster_run_under_the_installed_python(commands: str, read: Any, key: str, tmp_path: Path) -> None:
    """Each command in a home of its own, in which `ray` says which `python` and key a job that it starts would find."""
    (tmp_path / ".darnet-key").write_text("secret\n")
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("ray", 'echo "$1 $(command -v python) $DARNET_PSEUDONYM_KEY"'), ("python", "")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.10"}
    told = [
        subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True).stdout
        for line in read()[commands]
    ]
    assert told[-1] == f"start {programs / 'python'} {key}\n"


def test_the_night_has_kuberays_fields() -> None:
    assert (NIGHTLY["apiVersion"], NIGHTLY["kind"]) == ("ray.io/v1", "RayCronJob")
    _assert_fields(NIGHTLY["spec"], ({"schedule": str, "jobTemplate": dict}, {"suspend": bool}))
    _assert_fields(JOB, JOB_FIELDS)
    _assert_fields(JOB["submitterConfig"], ({}, {"backoffLimit": int}))
    _assert_fields(JOB["rayClusterSpec"], CLUSTER_FIELDS)
    _assert_fields(JOB["rayClusterSpec"]["headGroupSpec"], HEAD_FIELDS)
    for group in WORKERS.values():
        _assert_fields(group, WORKER_FIELDS)
    for group in (JOB["rayClusterSpec"]["headGroupSpec"], *WORKERS.values()):
        _assert_fields(group["template"], ({"spec": dict}, {"metadata": dict}))
        _assert_pod_fields(group["template"]["spec"])
    assert JOB["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("serviceAccountName", "serviceAcountName"),
        ("tolerations", "toleration"),
        ("effect:", "efect:"),
        ("limits:", "limit:"),
        ("enableServiceLinks: false", "enableServiceLinks: true"),
        ("enableServiceLinks: false", ""),
    ],
)
def test_a_wrong_field_of_a_pod_is_found(old: str, new: str) -> None:
    """A server may drop it, and the pod start without."""
    text = yaml.safe_dump(WORKERS["gpu"]["template"]["spec"])
    assert old in text
    with pytest.raises((AssertionError, KeyError)):
        _assert_pod_fields(yaml.safe_load(text.replace(old, new)))


def test_the_night_starts_once_a_day() -> None:
    minute, hour, *rest = NIGHTLY["spec"]["schedule"].split()
    assert minute.isdigit()
    assert hour.isdigit()
    assert rest == ["*", "*", "*"]


def test_the_night_runs_a_command_that_the_job_understands() -> None:
    python, flag, module, *flags = shlex.split(JOB["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "jobs.score")
    settings = read_settings(ScoreSettings, flags, "x")
    assert settings.archive.startswith("s3://")
    assert settings.score.device == "gpu"  # or a night that begins before a GPU is up would run on CPUs
    assert not settings.cam_images  # they show patients: who wants them asks for them
    assert settings.settle_s == 1800  # a scan that is still arriving waits for the next night


def test_the_pictures_that_a_comment_offers_lie_apart() -> None:
    (offered,) = re.findall(r"^# +(--cam-images .*)$", NIGHTLY_TEXT, re.M)
    settings = read_settings(ScoreSettings, [*shlex.split(JOB["entrypoint"])[3:], *shlex.split(offered)], "x")
    places = (settings.archive, settings.results)
    assert settings.cam_images
    assert not [place for place in places if f"{settings.cam_images}/".startswith(f"{place}/")]


def test_the_night_tries_again_on_a_new_cluster_and_only_there() -> None:
    assert JOB["backoffLimit"] > 0
    assert JOB["submitterConfig"]["backoffLimit"] == 0
    assert JOB["shutdownAfterJobFinishes"] is True


def test_the_nights_cluster_is_the_pinned_ray_behind_a_token() -> None:
    cluster = JOB["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}


def test_the_nights_image_holds_the_pinned_packages() -> None:
    """Each line of the Dockerfile is an instruction; what it copies is here, and pip keeps to the constraints."""
    text = re.sub(r"^#.*\n", "", (ROOT / "jobs" / "Dockerfile").read_text(), flags=re.M)
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert {line[0] for line in lines} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER"}
    assert lines[0] == ["FROM", "python:3.11-slim"]
    copied = [name for line in lines if line[0] == "COPY" for name in line[1:-1]]
    assert {"constraints.txt", "pyproject.toml", "darnet", "jobs"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    (install,) = [line for line in lines if line[:3] == ["RUN", "pip", "install"]]
    assert install[-3:] == ["-c", "constraints.txt", "."]
    assert f"ray=={JOB['rayClusterSpec']['rayVersion']} " in (ROOT / "constraints.txt").read_text()
    assert [line for line in lines if line[0] == "USER"] == [["USER", "ray"]]
    assert _find_container(JOB["rayClusterSpec"]["headGroupSpec"])["image"].endswith(f":{version('darnet')}")


def test_no_work_lands_on_the_nights_head_and_one_gpu_group_is_up() -> None:
    assert JOB["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    limits = {name: _find_container(group)["resources"]["limits"] for name, group in WORKERS.items()}
    assert "nvidia.com/gpu" not in limits["decode"]
    assert limits["gpu"]["nvidia.com/gpu"] == 1
    assert WORKERS["gpu"]["minReplicas"] >= 1


def test_the_key_of_pseudonyms_is_in_every_pod_and_in_no_file() -> None:
    for group in (JOB["rayClusterSpec"]["headGroupSpec"], *WORKERS.values()):
        (entry,) = _find_container(group)["env"]
        assert entry["name"] == "DARNET_PSEUDONYM_KEY"
        assert set(entry["valueFrom"]["secretKeyRef"]) == {"name", "key"}
        assert "value" not in entry


def _find_container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found
