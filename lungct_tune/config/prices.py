"""Prices of nodes, from clusters/prices.yaml, and the node types that an autoscaler's configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lungct_tune.config.yaml_file import read_yaml
from lungct_tune.errors import UserError

PACKAGE = Path(__file__).parents[1]
PRICES = Path("clusters", "prices.yaml")

MAX_WORKERS = 2
"""The most workers of a cluster whose file does not say so (Ray's default for all clouds)."""

Amount = Annotated[float, Field(ge=0, lt=100_000, allow_inf_nan=False, strict=True)]


class PricesError(UserError):
    """Prices that cannot be used. The message names the file and the key, and says what to do."""


class NodePrice(BaseModel):
    """The price of an hour of one node, and its GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_demand: Amount
    spot: Amount | None = None
    gpu: Annotated[str, Field(min_length=1)] | None = None
    """What the name of its GPU contains."""
    gpus: Annotated[int, Field(ge=0, le=64, strict=True)] = 0
    looked_up: Annotated[str, Field(min_length=1, max_length=100)]
    """When and where."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.gpu is None) != (self.gpus == 0):
            raise ValueError("gpu and gpus are the name of its GPU and how many it has; give both, or neither")
        return self


class Prices(BaseModel):
    """All prices, by node type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: Annotated[str, Field(min_length=1, max_length=20)]
    node_types: dict[str, NodePrice]


@dataclass(frozen=True)
class NodeType:
    """A node type of an autoscaler's configuration."""

    instance: str
    """The cloud's name for it, such as "g6.xlarge"."""
    is_spot: bool
    most: int
    """The most nodes of this type."""


@dataclass(frozen=True)
class PricedCluster:
    """The node types of an autoscaler's configuration, and their prices."""

    file: str
    head: NodeType
    workers: tuple[NodeType, ...]
    most_workers: int
    """The most workers of all types together."""
    idle_minutes: float
    """How long a worker without work stays."""

    @property
    def instances(self) -> list[str]:
        """The cloud's names for its types, each once."""
        return list(dict.fromkeys(kind.instance for kind in (self.head, *self.workers)))

    def hourly(self, prices: Prices, workers: int) -> tuple[float, float]:
        """The least and the most that an hour of the head and of so many workers costs."""
        head = prices.node_types[self.head.instance].on_demand
        kinds = sorted((_price(prices.node_types[kind.instance], kind.is_spot), kind.most) for kind in self.workers)
        return head + _price_of(workers, kinds), head + _price_of(workers, kinds[::-1])


def _price_of(workers: int, kinds: Sequence[tuple[float, int]]) -> float:
    """The price of so many workers of these types, as many of the first as there may be, then of the next.

    Args:
        kinds: the price of each type, and the most nodes of it.
    """
    total = 0.0
    for price, most in kinds:
        total += price * min(workers, most)
        workers -= min(workers, most)
    return total


def _price(price: NodePrice, is_spot: bool) -> float:
    return price.spot if is_spot and price.spot is not None else price.on_demand


def read_prices() -> tuple[Path, Prices] | None:
    """The prices in clusters/prices.yaml of the working folder, or else of the program; None if there is no such file.

    Raises:
        PricesError: the file cannot be read, or a key or a value is wrong.
    """
    places = (PRICES, PACKAGE / PRICES, PACKAGE.parent / PRICES)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise PricesError(f"{file}: {error}") from error
    try:
        return file, Prices.model_validate(content)
    except ValidationError as error:
        raise PricesError("\n".join(_explain(file, problem) for problem in error.errors())) from None


def _explain(file: Path, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    found = "" if problem["type"] == "missing" else f", found {problem['input']!r:.100}"
    known = f"; a node type has {', '.join(NodePrice.model_fields)}" if problem["type"] == "extra_forbidden" else ""
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        reason = f"expected {'KEY: VALUE' if key else 'the keys currency and node_types'}"
    return f"{file}: {key + ': ' if key else ''}{reason[0].lower()}{reason[1:]}{found}{known}"


def priced_cluster(file: Path) -> PricedCluster | None:
    """The node types in an autoscaler's configuration; None where it names none, as for own machines.

    Sources: https://docs.ray.io, "Cluster YAML configuration options"; the node_config of Amazon (EC2's RunInstances)
    and Google (Compute Engine's instances).
    """
    try:
        config = yaml.safe_load(file.read_text("utf-8"))  # Ray's file, with aliases
        types = config["available_node_types"]
        head = config["head_node_type"]
        of_workers = [kind for name, kind in types.items() if kind.get("max_workers", name != head)]
        most = _count(config.get("max_workers", MAX_WORKERS))
        workers = tuple(_node_type(kind, _count(kind.get("max_workers", most))) for kind in of_workers)
        most_workers = min(most, sum(kind.most for kind in workers))
        idle_minutes = float(config.get("idle_timeout_minutes", 5))
        return PricedCluster(str(file), _node_type(types[head], 1), workers, most_workers, idle_minutes)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def _count(value: Any) -> int:
    """A number of nodes.

    Raises:
        TypeError: it is none; Ray refuses such a file too.
    """
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no number of nodes")
    return value


def _node_type(kind: Mapping[str, Any], most: int) -> NodeType:
    node: Mapping[str, Any] = kind["node_config"]
    instance = node["InstanceType"] if "InstanceType" in node else node["machineType"]
    is_spot = (
        node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or node.get("scheduling", {}).get("provisioningModel") == "SPOT"
    )
    return NodeType(str(instance).rpartition("/")[2], is_spot, most)


def without_price(cluster: PricedCluster, prices: Prices) -> Sequence[str]:
    """The node types of a cluster that have no price."""
    return [name for name in cluster.instances if name not in prices.node_types]
