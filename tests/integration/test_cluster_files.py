"""cluster.yaml and what lies in clusters/: what Ray, AWS and Kubernetes are told there, judged by their own code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aws import MY_ADDRESS, REPOSITORY, TEMPLATE, Aws, bootstrap, launch_head, serve
from packaging.specifiers import SpecifierSet

from lungct_tune.config.settings import read_settings, validate

if TYPE_CHECKING:
    from collections.abc import Iterator

CLUSTERS = REPOSITORY / "clusters"
LAUNCHER_FILES = ["cluster.yaml", "clusters/gcp.yaml"]
ONPREM, KUBERAY, SLURM = "clusters/onprem.yaml", "clusters/kuberay.yaml", "clusters/slurm.sh"


def text(file: str) -> str:
    return (REPOSITORY / file).read_text()


def load(file: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text(file)))


# ---- what all of them share ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*LAUNCHER_FILES, "clusters/Dockerfile"])
def test_nodes_have_the_pinned_ray_and_the_python_that_the_lock_is_for(file: str) -> None:
    (ray,) = re.findall(r"^ray==(\S+)", text("requirements.lock"), re.MULTILINE)
    (python,) = re.findall(r"--python-version (\S+)", text("Makefile"))
    assert python in SpecifierSet(tomllib.loads(text("pyproject.toml"))["project"]["requires-python"])
    images = re.findall(r"rayproject/ray:(\S+)", text(file))
    assert images
    assert {image.rpartition("-")[0] for image in images} == {f"{ray}-py{python.replace('.', '')}"}
    assert yaml.safe_load(text(KUBERAY).split("---")[1])["spec"]["rayClusterSpec"]["rayVersion"] == ray


def searches(file: str, data: Path) -> list[list[str]]:
    """The arguments of every search that a file shows; the images are to be found in `data`."""
    lines = re.sub(r"\\\n#? *", "", text(file))
    shown = re.findall(r"ray job submit .*-- python -m lungct_tune\.search (.+)'", lines)
    shown += re.findall(r"sbatch clusters/slurm\.sh (.+?)(?:   |`)", lines)
    shown += re.findall(r"entrypoint: >-\n\s+python -m lungct_tune\.search ((?:.+\n)+?)  #", lines)
    return [shlex.split(re.sub(r"--data \S+", f"--data {data}", arguments)) for arguments in shown]


@pytest.mark.parametrize("file", ["docs/cluster.md", *LAUNCHER_FILES, ONPREM, KUBERAY, SLURM])
def test_every_search_that_a_file_shows_is_one_that_the_settings_take(file: str, tmp_path: Path) -> None:
    shown = searches(file, data=tmp_path)
    assert shown
    for arguments in shown:
        _, given = read_settings(arguments)
        assert given == {word[2:].replace("-", "_") for word in arguments if word.startswith("--")}


def test_amazons_and_googles_clusters_are_set_up_alike() -> None:
    """But for the cloud's own: prices, machines, network, and what the head asks the cloud with."""
    aws, google = (load(file) for file in LAUNCHER_FILES)
    same = ("cluster_name", "max_workers", "idle_timeout_minutes", "auth", "docker", "file_mounts", "rsync_exclude")
    same += ("initialization_commands", "setup_commands", "worker_start_ray_commands")
    assert {key: aws[key] for key in same} == {key: google[key] for key in same}
    (aws_head,), (google_head,) = aws["head_setup_commands"], google["head_setup_commands"]
    assert aws_head.removesuffix("aws") == google_head.removesuffix("gcp")


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_a_node_is_started_as_it_should_be(file: str) -> None:
    from ray.scripts.scripts import start

    config = load(file)
    for role in ("head", "worker"):
        *_, command = config[f"{role}_start_ray_commands"]
        options = start.make_context("ray start", shlex.split(command.partition("ray start ")[2])).params
        assert options["metrics_export_port"] == 8080
        assert options["head"] == (role == "head")
        assert not options["head"] or options["dashboard_host"] == "127.0.0.1"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    for local in set(config["file_mounts"].values()) - {"~/.ray/auth_token"}:
        assert (REPOSITORY / local).exists()


@pytest.mark.parametrize("file", LAUNCHER_FILES)
def test_ray_finds_nothing_wrong_with_a_file(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(REPOSITORY)
    config = prepare_config(load(file))
    validate_config(config)
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    for name, kind in config["available_node_types"].items():
        assert re.fullmatch("[a-z0-9-]+", name)  # it becomes a label, for which Google Cloud takes no other letters
        assert (kind["min_workers"], kind["max_workers"]) == (0, 0 if name == "head" else config["max_workers"])


def test_a_search_takes_all_that_the_cluster_may_grow_to(aws_config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config

    from lungct_tune.tuning.allocation import divide, workers_of

    settings = validate({"trials": 40, "batch_size": 32})
    for config in (aws_config, prepare_config(load("clusters/gcp.yaml"))):
        allotment = divide(settings, [{"memory": 16e9, "node:__internal_head__": 1.0}], workers_of(config))
        assert (allotment.slots, allotment.resources_per_worker["GPU"]) == (config["max_workers"], 1)


# ---- AWS: Ray's own code against moto's -------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    """AWS with our stack, seen from a laptop that has a token."""
    home = tmp_path_factory.mktemp("laptop")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("token")
    with pytest.MonkeyPatch.context() as laptop, serve() as served:
        laptop.setenv("HOME", str(home))
        laptop.chdir(REPOSITORY)
        yield served


@pytest.fixture(scope="module")
def aws_config(aws: Aws) -> dict[str, Any]:
    return bootstrap()


def test_the_stack_is_one_that_aws_knows_how_to_make() -> None:
    from cfnlint.api import lint_file

    assert lint_file(TEMPLATE) == []


def test_nobody_but_one_address_reaches_a_node_and_only_by_ssh(aws_config: dict[str, Any]) -> None:
    import boto3

    groups = {kind["node_config"]["SecurityGroupIds"][0] for kind in aws_config["available_node_types"].values()}
    found = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in found} == {"lungct", "default"}  # Ray has made none
    (ours,) = [group for group in found if group["GroupId"] in groups]
    ssh, among_nodes = ours["IpPermissions"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")
    assert [source["CidrIp"] for source in ssh["IpRanges"]] == [MY_ADDRESS]
    assert {pair["GroupId"] for pair in among_nodes["UserIdGroupPairs"]} == groups
    assert not ssh["UserIdGroupPairs"] and not among_nodes["IpRanges"]
    assert not ssh["Ipv6Ranges"] and not among_nodes["Ipv6Ranges"]


@pytest.mark.parametrize(("address", "allowed"), [("0.0.0.0/0", False), ("10.0.0.0/8", False), (MY_ADDRESS, True)])
def test_the_stack_refuses_to_let_the_world_knock(address: str, allowed: bool) -> None:
    (pattern,) = re.findall("AllowedPattern: '(.*)'", TEMPLATE.read_text())
    assert bool(re.search(pattern, address)) == allowed


def test_what_ray_launches_is_what_the_file_promises(aws: Aws, aws_config: dict[str, Any]) -> None:
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND

    aws.asked.clear()
    provider, _ = launch_head(aws_config)
    for kind in ("gpu-spot", "gpu-on-demand"):
        tags = {TAG_RAY_NODE_KIND: "worker", "ray-user-node-type": kind, "ray-launch-config": "0"}
        provider.create_node(aws_config["available_node_types"][kind]["node_config"], tags, 1)
    head, spot, on_demand = aws.requests("RunInstances")
    market = "InstanceMarketOptions.MarketType"
    assert [request.get(market) for request in (head, spot, on_demand)] == [None, "spot", None]
    profile = "IamInstanceProfile.Name"
    assert [request[profile] for request in (head, spot, on_demand)] == ["lungct-head", *["lungct-worker"] * 2]
    for request in (head, spot, on_demand):
        assert request["MetadataOptions.HttpTokens"] == "required"
        assert request["ImageId"] == "ami-03cf127a"  # the stack's, not Ray's of 2021
        assert request["SecurityGroupId.1"].startswith("sg-") and "SecurityGroupId.2" not in request
        disk = {key.rpartition(".")[2]: value for key, value in request.items() if key.startswith("BlockDevice")}
        assert disk == {"DeviceName": "/dev/sda1", "VolumeSize": "150", "VolumeType": "gp3", "Encrypted": "true"}
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []


def test_on_demand_nodes_come_only_where_aws_has_no_spot_ones(
    aws: Aws, aws_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.autoscaler import StandardAutoscaler
    from ray.autoscaler._private.load_metrics import LoadMetrics

    (scorer,) = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", str(aws_config["head_start_ray_commands"]))
    monkeypatch.setenv("RAY_AUTOSCALER_UTILIZATION_SCORER", scorer)
    provider, head = launch_head(aws_config)
    waiting, memory = LoadMetrics(), {"memory": 1e9}
    waiting.update(head, b"0" * 28, memory, memory, 0, [], [{"CPU": 1.0, "GPU": 1.0}], [])
    there = {"provider": aws_config["provider"] | {"disable_node_updaters": True}, "file_mounts": {}}
    autoscaler = StandardAutoscaler(lambda: aws_config | there, waiting, None, update_interval_s=0)

    def next_worker() -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            autoscaler.update()
            if workers := provider.non_terminated_nodes({"ray-node-type": "worker"}):
                kinds = {provider.node_tags(worker)["ray-user-node-type"] for worker in workers}
                provider.terminate_nodes(workers)
                return " and ".join(kinds)
            time.sleep(0.1)
        raise TimeoutError("no worker was launched")

    assert next_worker() == "gpu-spot"
    aws.has_spot = False
    aws.asked.clear()
    assert next_worker() == "gpu-on-demand"
    asked = [request.get("InstanceMarketOptions.MarketType") for request in aws.requests("RunInstances")]
    assert "spot" in asked[:-1]
    assert {request["Action"] for request in aws.asked} <= allowed_on("lungct-head")
    provider.terminate_nodes(provider.non_terminated_nodes({}))


def statements_for(role: str) -> list[dict[str, Any]]:
    """What a role may do, by its own policies and those attached to it."""
    import boto3

    iam = boto3.client("iam")
    documents = [
        iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    ]
    for policy in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        version = iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId="v1")
        documents.append(version["PolicyVersion"]["Document"])
    # moto hands out a stack's policies as text
    parsed = [yaml.safe_load(document) if isinstance(document, str) else document for document in documents]
    return [statement for document in parsed for statement in document["Statement"]]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allowed_on(role: str) -> set[str]:
    return {
        action.removeprefix("ec2:") for statement in statements_for(role) for action in as_list(statement["Action"])
    }


def test_rights_are_the_least_that_do(aws: Aws) -> None:
    for role in ("lungct-head", "lungct-worker"):
        for statement in statements_for(role):
            assert not any("*" in action for action in as_list(statement["Action"]))
            assert "*" not in as_list(statement["Resource"]) or statement["Action"] == "ec2:DescribeInstances"
    bucket = "arn:aws:s3:::my-bucket"
    assert {r for s in statements_for("lungct-worker") for r in as_list(s["Resource"])} == {bucket, f"{bucket}/*"}
    own = [s for s in statements_for("lungct-head") if "ec2:TerminateInstances" in as_list(s["Action"])]
    assert [s["Condition"]["StringEquals"] for s in own] == [
        {"aws:ResourceTag/ray-cluster-name": load("cluster.yaml")["cluster_name"]}
    ]


# ---- Kubernetes ------------------------------------------------------------------------------------------


def test_kubernetes_autoscaler_reads_the_cluster_as_it_is_meant(tmp_path: Path) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    account, job, _ = yaml.safe_load_all(text(KUBERAY))
    cluster = job["spec"]["rayClusterSpec"]
    config = _derive_autoscaling_config_from_ray_cr({"metadata": job["metadata"] | {"namespace": "x"}, "spec": cluster})
    validate_config(config)
    head, gpu = config["available_node_types"].values()
    assert (head["resources"]["CPU"], gpu["resources"]["GPU"], gpu["min_workers"]) == (0, 1, 0)
    settings, _ = read_settings(*searches(KUBERAY, data=tmp_path))
    assert settings.slots == gpu["max_workers"] and settings.gpus_per_worker == 1
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert {pod["serviceAccountName"] for pod in pods} == {account["metadata"]["name"]}
    (built,) = re.findall(r"--tag (\S+)", text("clusters/Dockerfile"))
    assert {pod["containers"][0]["image"] for pod in pods} == {built}


def test_kubernetes_lets_nobody_but_the_cluster_and_its_operator_reach_the_pods() -> None:
    _, job, policy = yaml.safe_load_all(text(KUBERAY))
    spec, cluster = policy["spec"], job["spec"]["rayClusterSpec"]
    own = spec["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert own.items() <= group["template"]["metadata"]["labels"].items()
    assert spec["policyTypes"] == ["Ingress"]
    among, dashboard = spec["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert [port["port"] for port in dashboard["ports"]] == [8265]
    operator, submitter = (source["podSelector"]["matchLabels"] for source in dashboard["from"])
    assert operator == {"app.kubernetes.io/component": "kuberay-operator"}
    assert submitter == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}


# ---- on a machine of its own -----------------------------------------------------------------------------

SEPARATE = "--net --mount --pid --fork --mount-proc"
MACHINE = """
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
ip link set lo up
ip link add eth0 type veth peer name eth1
ip address add 10.9.0.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up
ip route add default dev eth0
exec "$@"
"""
"""One address, processes, and a /tmp/ray that no other Ray on this machine sees; the other end of its cable is eth1."""

SRUN = f"""\
#!/bin/bash
# As Slurm's: a command on every node of the job. The second node is made here, at the other end of the cable.
while [[ $1 == --* ]]; do shift; done
unshare {SEPARATE} --kill-child bash -c '
    mount -t tmpfs tmpfs /tmp/ray
    ip link set lo up
    until ip link set eth1 up 2> /dev/null; do sleep 0.1; done
    ip address add 10.9.0.2/24 dev eth1
    ip route add default dev eth1
    "$@"; exit' node "$@" &
while ip link set eth1 netns $! 2> /dev/null; do sleep 0.1; done
unshare --mount --pid --fork --mount-proc --kill-child bash -c '"$@"; exit' node "$@"
wait $!
"""


def on_a_machine_of_its_own(command: list[str], home: Path, **environment: str) -> str:
    """What the command prints; it must end well."""
    home.mkdir(exist_ok=True)
    path = f"{REPOSITORY / '.venv' / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin"
    kept = {"HOME": str(home), "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*shlex.split(f"unshare {SEPARATE} --kill-child bash -ec"), MACHINE, "machine", *command],
        env={key: os.environ[key] for key in ("XDG_CACHE_HOME", "RAY_worker_niceness")} | kept | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def no_machine() -> str | None:
    if os.geteuid() != 0:
        return "a machine of its own needs root"
    if shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        return "a machine of its own needs Debian's iproute2"
    tried = subprocess.run(shlex.split(f"unshare {SEPARATE} true"), capture_output=True, text=True)
    return f"a machine of its own needs namespaces: {tried.stderr}" if tried.returncode else None


machine = pytest.mark.skipif(no_machine() is not None, reason=no_machine() or "")


@pytest.mark.long
@pytest.mark.ray
@machine
def test_the_head_of_cluster_yaml_asks_for_a_token_and_grows_the_cluster(tmp_path: Path) -> None:
    said = on_a_machine_of_its_own([sys.executable, str(Path(__file__).parent / "aws_head.py")], tmp_path / "home")
    seen = json.loads(said.splitlines()[-1])
    assert seen["dashboard"] == ["127.0.0.1"]
    assert (seen["without token"], seen["with token"], seen["metrics"]) == (401, 200, 200)
    assert (seen["nodes"] > 1, seen["asked"][0], seen["asked"][-1]) == (True, "spot", "on-demand")


@pytest.mark.long
@pytest.mark.ray
@machine
def test_a_slurm_job_is_one_cluster_of_all_its_nodes_and_ends_as_its_search(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    said = on_a_machine_of_its_own(
        ["bash", "-c", f'PATH="{tmp_path}:$PATH" bash {SLURM} --storage /proc/none || echo "ended with $?"'],
        tmp_path / "home",
        SLURM_SUBMIT_DIR=str(REPOSITORY),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        SLURM_CPUS_PER_TASK="1",
        RAY_gcs_rpc_server_reconnect_timeout_s="3",  # how long the head has gone when a node leaves; else 60
    )
    assert "2 slots of 1 worker with 1 CPU each" in said
    assert said.endswith("ended with 2\n")  # nobody can write to that storage
