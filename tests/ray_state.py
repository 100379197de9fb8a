"""What Ray has and runs while tests look."""

from __future__ import annotations

import time


def nothing_held(within_s: float = 90, besides: tuple[str, ...] = ()) -> bool:
    """No actor, no placement group, all CPUs free; what is going away gets a little time to be gone.

    Args:
        besides: classes of actors that may be there.
    """
    import ray
    from ray.util.state import list_actors, list_placement_groups

    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        alive = [a for a in list_actors(limit=10_000) if a.state in ("ALIVE", "PENDING_CREATION", "RESTARTING")]
        # Ray Train's own, without resources: one for the whole cluster, and one that stays when the state API is slow;
        # and Ray Data's, one each for the whole cluster
        own = ("_AutoscalingCoordinatorActor", "PlacementGroupCleaner", "_StatsActor", "ActorLocationTracker")
        actors = [a for a in alive if a.class_name not in (*own, *besides)]
        groups = [g for g in list_placement_groups(limit=10_000) if g.state != "REMOVED"]
        if not actors and not groups and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.5)
    print([(a.class_name, a.state) for a in actors], groups, ray.available_resources())
    return False


def train_workers() -> list[int]:
    """The process ids of the workers of slots and of the retraining."""
    from ray.util.state import list_actors

    alive = [
        a for a in list_actors(detail=True, limit=10_000) if a.class_name == "RayTrainWorker" and a.state == "ALIVE"
    ]
    return [worker.pid for worker in alive]
