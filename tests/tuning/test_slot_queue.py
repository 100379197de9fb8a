"""Slots that Ray Tune does not manage: what their processes are told, and what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.trial import EpochReport, Outcome, TrialOrder
from lungct_tune.filesystem import NodeRefused
from lungct_tune.tuning.slot_plan import SlotPlan

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def plan(tmp_path: Path) -> SlotPlan:
    """Of workers that get no order."""
    return SlotPlan(Experiment.at(str(tmp_path), "one"), None, (), 1, {"CPU": 1.0}, None)  # type: ignore[arg-type]


def test_a_slots_process_lets_ray_train_wait_for_room_and_starts_on_no_node_that_is_left_alone(plan: SlotPlan) -> None:
    """On a cluster that a command joins, no variable of its process reaches an actor."""
    import ray

    from lungct_tune.tuning.mailbox import opened_mailbox
    from lungct_tune.tuning.slot_actor import SlotActor
    from lungct_tune.tuning.slots import OF_RAY_TRAIN

    with opened_mailbox("one") as mailbox:
        ray.get(mailbox.avoid.remote({"f" * 56}))
        slot = SlotActor(replace(plan, mailbox=mailbox))
        seen, avoided = ray.get(slot._actor.__ray_call__.remote(lambda it: (dict(os.environ), it._group.avoid)))
        assert seen.items() >= OF_RAY_TRAIN.items()
        assert avoided == {"f" * 56}
        slot.end()


def test_errors_of_a_slots_process_reach_the_user_as_they_are(plan: SlotPlan) -> None:
    import ray

    from lungct_tune.tuning.slot_actor import SlotQueue

    class Refusing:
        def run(self, order: TrialOrder) -> EpochReport:
            raise NodeRefused("node 1: cannot write")

    class Dying:
        def run(self, order: TrialOrder) -> EpochReport:
            os._exit(1)

    class InActor:
        def __init__(self, kind: type) -> None:
            self.actor: Any = ray.remote(kind).options(num_cpus=0).remote()

        def run(self, order: TrialOrder) -> Any:
            return self.actor.run.remote(order)

    queue, order = SlotQueue(plan), TrialOrder(0, 0, Hyperparameters())
    refusing = InActor(Refusing)
    with pytest.raises(NodeRefused, match=r"^node 1: cannot write$"):
        queue._step(refusing, order)  # type: ignore[arg-type]
    ray.kill(refusing.actor)
    report = queue._step(InActor(Dying), order)  # type: ignore[arg-type]
    assert report.outcome is Outcome.FAILED and "the process of the slot has ended" in report.reason


def test_a_second_ctrl_c_waits_for_the_threads_of_slots_that_end(plan: SlotPlan) -> None:
    """They use Ray, which ends the process without a word if they do so after it has ended itself."""
    from lungct_tune.tuning.slot_actor import SlotQueue

    class Ending:
        def end(self) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.5)
            signal.raise_signal(signal.SIGINT)
            ended.append(True)

    ended: list[bool] = []
    queue = SlotQueue(plan)
    queue._slots = [Ending()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        queue.end()
    assert ended


def test_only_groups_of_workers_of_these_slots_are_counted_as_waiting() -> None:
    from ray.util import placement_group, remove_placement_group

    from lungct_tune.tuning.groups import waiting_for_room

    of_another = (
        "import ray; ray.init(); ray.util.placement_group([{'CPU': 50}], name='one-slot-1-a').wait(1); "
        "print('waits'); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", of_another], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as other:
        assert other.stdout and b"waits\n" in other.stdout  # Ray may print there, too
        assert waiting_for_room("one slot") == 0
        groups = [placement_group([{"CPU": 50}] * 2, name=f"one-{kind}-1-b") for kind in ("slot", "final-slot")]
        for group in groups:
            group.wait(1)
        assert waiting_for_room("one slot") == waiting_for_room("one final slot") == 1
        for group in groups:
            remove_placement_group(group)
        other.kill()
