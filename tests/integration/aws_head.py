"""What happens on the head of cluster.yaml, on a machine of its own (see test_cluster_files) and without spot nodes.

Ray is started by the file's own commands, with what `ray up` puts before them; AWS is moto. Prints what was seen.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
from aws import REPOSITORY, bootstrap, launch_head, serve
from ray.autoscaler._private.command_runner import _with_environment_variables
from ray.autoscaler._private.commands import _set_up_config_for_head_node
from ray.autoscaler._private.util import with_envs

WAITS_FOR_GPUS = "import ray; ray.init(); ray.get(ray.util.placement_group([{'CPU': 1, 'GPU': 1}] * 4).ready())"


def run(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def status(url: str, token: str = "") -> int:
    try:
        return int(urlopen(Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})).status)
    except HTTPError as refusal:
        return refusal.code


def main() -> None:
    home = Path.home()
    (home / "lungct_tune").symlink_to(REPOSITORY)
    run("ray get-auth-token --generate")
    with serve() as aws:
        aws.has_spot = False
        config = bootstrap()
        provider, head = launch_head(config)
        run(f"ip address flush eth0; ip address add {head}/16 dev eth0; ip route replace default dev eth0")
        shutil.copy(config["auth"]["ssh_private_key"], home / "ray_bootstrap_key.pem")
        _, for_the_head = _set_up_config_for_head_node(config, provider, no_restart=False)
        shutil.copy(for_the_head.name, home / "ray_bootstrap_config.yaml")

        ours = " ".join(option.removeprefix("--env ") for option in config["docker"]["run_options"])
        ours = f"export {ours.replace('/home/ray', str(home))}; "
        rays = {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": "i-0", "RAY_NODE_TYPE_NAME": "head"}
        resources = {"RAY_OVERRIDE_RESOURCES": config["available_node_types"]["head"]["resources"]}
        for command in with_envs(config["head_start_ray_commands"], rays):
            run(ours + _with_environment_variables(command, resources))
        aws.asked.clear()
        run(f'{ours}ray job submit --no-wait --submission-id lung -- python -c "{WAITS_FOR_GPUS}"')
        deadline = time.monotonic() + 180
        while len(provider.non_terminated_nodes({})) < 2 and time.monotonic() < deadline:
            time.sleep(1)
        listening = {c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        seen = {
            "asked": [
                request.get("InstanceMarketOptions.MarketType", "on-demand") for request in aws.requests("RunInstances")
            ],
            "nodes": len(provider.non_terminated_nodes({})),
            "dashboard": [ip for ip, port in listening if port == 8265],
            "without token": status("http://127.0.0.1:8265/api/jobs/"),
            "with token": status("http://127.0.0.1:8265/api/jobs/", (home / ".ray" / "auth_token").read_text()),
            "metrics": status(f"http://{head}:8080/metrics"),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
