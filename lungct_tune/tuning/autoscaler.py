"""Makes Ray's autoscaler start a type of node that the cloud has available (cluster.yaml gives the function to Ray)."""

from __future__ import annotations

from typing import Any

from lungct_tune.tuning.ray_compat import Private


def prefer_available(
    resources: Any, demands: Any, node_type: str, *, node_availability_summary: Any
) -> tuple[Any, ...] | None:
    """Ray's own score of a node type, but below all others if the cloud has refused to start such a node.

    Ray 2.60 gives a scorer the refusals of the last half hour, but its own scorer ignores them. If no spot nodes are
    available, it asks for one again and again (ray #20774). Among types of equal score Ray takes the last one of the
    alphabet: `gpu-spot` before `gpu-on-demand`.
    """
    score = Private.UTILIZATION_SCORER.load()(
        resources, demands, node_type, node_availability_summary=node_availability_summary
    )
    last_try = node_availability_summary.node_availabilities.get(node_type)
    return None if score is None else (last_try is None or last_try.is_available, *score)
