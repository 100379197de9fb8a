"""What a search will take, said before it does: hours and money, from the measured pace and the prices of nodes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray

from lungct_tune.config.prices import PRICES, PricedCluster, Prices, priced_cluster, read_prices, without_price
from lungct_tune.data.split import DataSplit
from lungct_tune.errors import number_of
from lungct_tune.experiment.forecast import Forecast, Workload, as_range
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.study import PLANNED, rungs
from lungct_tune.training.pace import Pace, PaceOrder, depths_to_measure, device_name, measured_pace, measured_slowdown
from lungct_tune.tuning.allocation import ResourcePlan, divide, divide_for_retraining, workers_that_fit
from lungct_tune.tuning.cluster import cluster_nodes, machines
from lungct_tune.tuning.ray_compat import autoscaling_config
from lungct_tune.tuning.sampler import first_trials

CLUSTER_FILE = Path("cluster.yaml")
"""The configuration of a cluster that may be started, in the working folder."""

NODE_START_MINUTES = 10.0
"""Until a new node works: it downloads an image and packages (cluster.yaml)."""

BUSY, MOST_SLOWDOWN = 1.25, 3.0
"""From this slowdown on the plan says that the machine is busy. Of a larger one than the second it is not known that it
lasts as long as the search."""

MOST_WAITING_S = 180.0
"""How long a measurement on the cluster may take."""

MESSAGE_S = 0.002
"""Seconds of a message between workers on CPUs, over Gloo, with waiting for each other. Those of GPUs do not count."""


@dataclass(frozen=True)
class Outlook:
    """What a search will take."""

    resources: ResourcePlan
    """The slots."""
    retraining: ResourcePlan
    """Those of the final retrainings."""
    lines: dict[str, str]
    """For the plan, by name: cluster, time, price."""
    work: Workload
    forecast: Forecast | None
    """None where the pace could not be measured."""
    seconds: tuple[float, float] | None
    """From now to the bundle: at least and at most."""

    def keep(self, study: optuna.Study, *, new: bool) -> None:
        """Puts the cluster and a new search's plan into the study. A resumed search has no plan: it has stood still."""
        study.set_user_attr("cluster", f"{self.resources}, on {machines()}")
        planned = None
        if new and self.forecast is not None:
            planned = {"seconds": self.seconds, "slowdown": self.forecast.slowdown, "began": time.time()}
        study.set_user_attr(PLANNED, planned)


def look_ahead(plan: Plan, split: DataSplit) -> Outlook:
    """Divides the cluster, measures the pace or takes it from the cache, and forecasts time and price. Starts no Ray.

    Raises:
        ClusterError: the cluster is too small.
        PricesError: clusters/prices.yaml cannot be used.
    """
    nodes, to_come = cluster_nodes()
    resources = divide(plan.settings, nodes, to_come)
    retraining = divide_for_retraining(plan.settings, nodes, to_come)
    head = f"the head needs {resources.head_memory / 2**30:.1f} GiB of memory for its part of the slots"
    lines = {"cluster": f"{resources}; the final retraining on {retraining.slot}; {head}"}
    order = _pace_order(plan, resources)
    on_worker = _pace_of_worker(order, resources) if len(nodes) > 1 else None
    pace = on_worker or measured_pace(order)
    prices = read_prices()
    work = _workload(plan, split, resources, retraining, len(nodes))
    if pace is None:
        lines["time"] = "not known: the pace could not be measured"
        return Outlook(resources, retraining, lines, work, None, None)
    processes = min(work.cpus, work.slots_of_machine * work.workers)
    slowdown = 1.0 if on_worker else min(MOST_SLOWDOWN, measured_slowdown(processes))
    known = first_trials(plan.space, seed=plan.settings.seed, trials=work.trials, slots=work.slots)
    forecast = Forecast(work, plan.space, pace, slowdown, known)
    seconds = forecast.total()
    text = f"{as_range(*seconds)} (measured on {'a worker' if on_worker else 'this machine'}: {pace.device})"
    if not plan.is_new:
        text = f"of the whole search {text}"
    if slowdown >= BUSY:
        text += f"; counted as {slowdown:.1f} times as long as on a quiet machine, because of other work here now"
    lines |= {"time": text} | _price_line(forecast, seconds, prices, resources, plan.settings.slots)
    return Outlook(resources, retraining, lines, work, forecast, seconds)


def _pace_order(plan: Plan, resources: ResourcePlan) -> PaceOrder:
    settings = plan.settings
    assert settings.image_size is not None and settings.batch_size is not None  # decided by for_data()
    each, gpu = resources.resources_per_worker, bool(resources.resources_per_worker.get("GPU"))
    threads = max(1, int(each["CPU"]))
    workers = resources.slots * resources.workers
    most = round(1 / min(1.0, each["GPU"])) if gpu else (os.cpu_count() or 1) // threads
    together = 1 if settings.cross_validates else settings.workers
    return PaceOrder(
        image_size=settings.image_size,
        images=settings.batch_size // together,
        depths=depths_to_measure(*plan.space.depths),
        threads=threads,
        gpu=gpu,
        beside=max(1, min(workers, most)),
        device=device_name(gpu=gpu),
    )


def _pace_of_worker(order: PaceOrder, resources: ResourcePlan) -> Pace | None:
    """The pace on a node that has room for a worker now; None if none has, or if it cannot be measured there."""
    if not resources.capacity:
        return None
    each = resources.resources_per_worker
    measure = ray.remote(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), max_retries=0)(_measure_there)
    measuring = measure.remote(order)
    try:
        pace: Pace | None = ray.get(measuring, timeout=MOST_WAITING_S)
    except ray.exceptions.RayError:
        ray.cancel(measuring, force=True)  # else it would go on in the room of a slot
        return None
    return pace


def _measure_there(order: PaceOrder) -> Pace | None:
    return measured_pace(replace(order, device=device_name(gpu=order.gpu)))


def _workload(plan: Plan, split: DataSplit, resources: ResourcePlan, retraining: ResourcePlan, nodes: int) -> Workload:
    settings = plan.settings
    assert settings.trials is not None and settings.epochs is not None and settings.batch_size is not None
    train_rows, valid_rows = split.folds[0]
    return Workload(
        trials=settings.trials,
        epochs=settings.epochs,
        rungs=rungs(settings.epochs),
        slots=resources.slots,
        train_images=len(train_rows),
        valid_images=len(valid_rows),
        searched_images=len(split.searched_rows),
        test_images=len(split.test_rows),
        batch_size=settings.batch_size,
        workers=resources.workers,
        folds=len(split.folds),
        ensemble=settings.ensemble,
        retrains=not settings.hold_test,
        compares=settings.compare_baseline or settings.data is None,
        seeds=2 * (settings.seeds or 0),  # also of the published configuration
        cpus=os.cpu_count() or 1,
        slots_of_machine=math.ceil(resources.slots / nodes),
        final_slots=min(resources.slots, retraining.slots),
        final_workers=retraining.workers,
        message_s=0.0 if resources.resources_per_worker.get("GPU") else MESSAGE_S,
    )


def _price_line(
    forecast: Forecast,
    seconds: tuple[float, float],
    prices: tuple[Path, Prices] | None,
    resources: ResourcePlan,
    most_slots: int | None,
) -> dict[str, str]:
    """What the nodes of the cluster at hand cost, or of the one that cluster.yaml describes; empty without either.

    Args:
        most_slots: the number that the user has set.
    """
    running = ray.is_initialized()
    file = autoscaling_config(ray.get_runtime_context().gcs_address) if running else str(CLUSTER_FILE)
    cluster = priced_cluster(Path(file).expanduser()) if file else None
    if cluster is None:
        return {}
    if prices is None:
        return {"price": f"not known: there is no {PRICES} in this folder"}
    path, known = prices
    if missing := without_price(cluster, known):
        return {"price": f"not known: {path} has no {' and '.join(missing)}; add a line for each under node_types"}
    if running:
        return {"price": f"{_cost(cluster, known, resources, seconds)}, on {_types(cluster, known)}"}
    low, high = cluster.hourly(known, cluster.most_workers)
    an_hour = f"{low:.2f} to {high:.2f}" if low != high else f"{low:.2f}"
    of_cluster = f"{number_of(cluster.most_workers, 'worker')} and the head of {cluster.file}"
    gpus = {known.node_types[kind.instance].gpu for kind in cluster.workers}
    if not any(gpu and gpu in forecast.pace.device for gpu in gpus):
        return {
            "price": f"an hour of {of_cluster} costs {an_hour} {known.currency} ({_types(cluster, known)}); "
            "the time above is for this machine's devices, not for theirs"
        }
    nodes = [{"GPU": known.node_types[cluster.workers[0].instance].gpus}] * cluster.most_workers
    workers = workers_that_fit(nodes, {"GPU": resources.resources_per_worker.get("GPU", 1.0)})
    there = replace(forecast, work=_on_workers(forecast.work, workers, most_slots), slowdown=1.0)
    time_there = there.total()
    cost = _cost(cluster, known, replace(resources, slots=there.work.slots), time_there)
    return {"price": f"{cost} and {as_range(*time_there)} on {of_cluster} ({_types(cluster, known)})"}


def _on_workers(work: Workload, workers: int, most_slots: int | None) -> Workload:
    """The same work in the slots that so many workers make, each slot on a machine of its own."""
    slots = max(1, min(workers // work.workers, most_slots or workers, work.trials))
    final_slots = max(1, min(workers // work.final_workers, slots))
    return replace(work, slots=slots, slots_of_machine=1, final_slots=final_slots)


def _cost(cluster: PricedCluster, prices: Prices, resources: ResourcePlan, seconds: tuple[float, float]) -> str:
    """The money for so much time, at least and at most. Nodes also cost while they start, and while they are idle."""
    gpus = max(1, max((prices.node_types[kind.instance].gpus for kind in cluster.workers), default=1))
    gpu = resources.resources_per_worker.get("GPU", 1.0) or 1.0
    nodes = min(cluster.most_workers, math.ceil(resources.slots * resources.workers * gpu / gpus))
    low, high = cluster.hourly(prices, nodes)
    more = (NODE_START_MINUTES + cluster.idle_minutes) * 60
    least, most = low * (seconds[0] + NODE_START_MINUTES * 60) / 3600, high * (seconds[1] + more) / 3600
    return f"{least:.2f} to {most:.2f} {prices.currency}"


def _types(cluster: PricedCluster, prices: Prices) -> str:
    """The node types with the source of their prices."""
    known: Mapping[str, Any] = prices.node_types
    sources = list(dict.fromkeys(known[name].looked_up for name in cluster.instances))
    kinds = "spot or on demand" if len({kind.is_spot for kind in cluster.workers}) > 1 else ""
    return "; ".join([", ".join(cluster.instances) + (f" {kinds}" if kinds else ""), *sources])
