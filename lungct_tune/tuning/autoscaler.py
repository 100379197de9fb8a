"""Which kind of node Ray's autoscaler starts next: one that the cloud has to give (cluster.yaml names it to Ray)."""

from __future__ import annotations

from typing import Any

from lungct_tune.tuning.ray_compat import UTILIZATION_SCORER, private


def prefer_available(
    resources: Any, demands: Any, node_type: str, *, node_availability_summary: Any
) -> tuple[Any, ...] | None:
    """Ray's own score of a node type, below all others while the cloud refuses to start such a node.

    Ray 2.60 tells a scorer what was refused within the last half hour, and its own takes no notice: where there
    are no spot nodes, it asks for one again and again (ray #20774). Types of equal score are taken from the end of the
    alphabet: `gpu-spot` before `gpu-on-demand`.
    """
    score = private(UTILIZATION_SCORER)(
        resources, demands, node_type, node_availability_summary=node_availability_summary
    )
    last_try = node_availability_summary.node_availabilities.get(node_type)
    return None if score is None else (last_try is None or last_try.is_available, *score)
