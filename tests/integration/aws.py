"""AWS as the tests have it: moto's server on loopback, which keeps what it was asked and can be out of spot nodes."""

from __future__ import annotations

import io
import logging
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "clusters" / "aws-access.yaml"
MY_ADDRESS = "203.0.113.7/32"
NO_SPOT = b"""\
<Response><Errors><Error><Code>InsufficientInstanceCapacity</Code><Message>no spot nodes left</Message></Error></Errors>
<RequestID>0</RequestID></Response>"""


class Aws:
    """A WSGI application: moto, seen through."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._moto = DomainDispatcherApplication(create_backend_app)
        self.asked: list[dict[str, str]] = []
        """The parameters of every request to EC2 and IAM, `Action` among them."""
        self.has_spot = True

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        if environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
            self.asked.append(dict(parse_qsl(body.decode())))
            if not self.has_spot and self.asked[-1].get("InstanceMarketOptions.MarketType") == "spot":
                start_response("500 Internal Server Error", [("Content-Type", "text/xml")])
                return [NO_SPOT]
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return answer

    def requests(self, action: str) -> list[dict[str, str]]:
        return [request for request in self.asked if request.get("Action") == action]


@contextmanager
def serve() -> Iterator[Aws]:
    """Serves AWS, with the stack of clusters/aws-access.yaml made; boto3 finds it by the environment."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    aws = Aws()
    server = make_server("127.0.0.1", 0, aws, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    _make_stack()
    yield aws
    server.shutdown()


def _make_stack() -> None:
    import boto3

    # the machine image's name is a parameter that AWS publishes and moto does not
    boto3.client("ssm").put_parameter(Name="/test/node-image", Value="ami-03cf127a", Type="String")
    published = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
    template = TEMPLATE.read_text()
    assert published in template
    boto3.client("cloudformation").create_stack(
        StackName="lungct",
        TemplateBody=template.replace(published, "/test/node-image"),
        Parameters=[
            {"ParameterKey": "Bucket", "ParameterValue": "my-bucket"},
            {"ParameterKey": "MyAddress", "ParameterValue": MY_ADDRESS},
        ],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )


def bootstrap() -> dict[str, Any]:
    """What `ray up cluster.yaml` makes of the file before it launches the head, by Ray's own code.

    The home must hold what a laptop's does: `~/.ray/auth_token`.
    """
    from ray.autoscaler._private.commands import _bootstrap_config

    return dict(_bootstrap_config(yaml.safe_load((REPOSITORY / "cluster.yaml").read_text()), no_config_cache=True))


def launch_head(config: dict[str, Any]) -> tuple[Any, str]:
    """Launches the head by Ray's own provider, as `ray up` does.

    Returns:
        The provider, and the head's private address.
    """
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {"ray-node-type": "head", "ray-user-node-type": "head", "ray-node-name": "ray-lungct-head"}
    tags |= {"ray-node-status": "up-to-date", "ray-launch-config": "0"}
    (head,) = provider.create_node(config["available_node_types"]["head"]["node_config"], tags, 1)
    return provider, provider.internal_ip(head)
