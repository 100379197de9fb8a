"""The mailbox of a search: what it knows of slots and nodes."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import pytest
from processes import wait_for

from lungct_tune.tuning.mailbox import REPORT, Mailbox, news_exchanged, opened_mailbox

if TYPE_CHECKING:
    from collections.abc import Coroutine

NODE, OTHER = "a", "b"


async def lost(mailbox: Mailbox, group: str, trial: str | None, nodes: tuple[str, ...] = (NODE,)) -> dict[str, float]:
    """Starts a group of workers that is lost in a trial."""
    await mailbox.open(group)
    for node in nodes:
        await mailbox.start(group, node)
    return await mailbox.lose(group, trial)


async def report(mailbox: Mailbox, group: str) -> None:
    await mailbox.open(group)
    await mailbox.start(group, NODE)
    await mailbox.put((group, REPORT, 1), None)


def test_trials_that_one_slot_loses_are_counted_while_the_other_gpus_of_the_node_work() -> None:
    async def counts() -> list[float]:
        mailbox, found = Mailbox("one"), []
        for trial in range(3):
            found.append((await lost(mailbox, f"one-slot-1-{trial}", f"trial {trial}"))[NODE])
            await report(mailbox, "one-slot-2-f")
        await report(mailbox, "one-slot-1-f")
        found.append((await lost(mailbox, "one-slot-1-4", "trial 4"))[NODE])
        return found

    assert asyncio.run(counts()) == [1, 2, 3, 1]


def test_trials_that_all_slots_of_a_node_lose_are_counted_together() -> None:
    async def counts() -> list[dict[str, float]]:
        mailbox = Mailbox("one")
        return [
            await lost(mailbox, f"one-slot-{slot}-f", f"trial {slot}", (NODE, OTHER)[: slot + 1]) for slot in range(3)
        ]

    assert asyncio.run(counts()) == [{NODE: 1}, {NODE: 2, OTHER: 1}, {NODE: 3, OTHER: 2}]


def test_only_the_node_that_refuses_is_to_blame_and_nobody_where_the_storage_is_away() -> None:
    async def counts() -> list[dict[str, float]]:
        mailbox = Mailbox("one")
        away = [await lost(mailbox, f"one-slot-1-{k}", None) for k in range(3)]
        await mailbox.refuse("one-slot-1-f", OTHER)
        return [*away, await lost(mailbox, "one-slot-1-f", None, (NODE, OTHER))]

    assert asyncio.run(counts()) == [*[{NODE: 0}] * 3, {NODE: 0, OTHER: math.inf}]


def test_a_sentence_is_said_once() -> None:
    async def said() -> list[str]:
        mailbox = Mailbox("one")
        for sentence in ("the storage is away", "the storage is away", "it is back"):
            await mailbox.warn(sentence)
        return await mailbox.exchange(set()) + await mailbox.exchange(set())

    assert asyncio.run(said()) == ["the storage is away", "it is back"]


def test_the_user_hears_news_at_once_and_those_of_the_end(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: what a slot had to say when the search stopped was not said."""
    import ray

    monkeypatch.setattr("lungct_tune.tuning.mailbox.was_asked", lambda: False)  # another test has sent a signal
    said: list[str] = []
    with opened_mailbox("one") as mailbox, news_exchanged(mailbox, said.append):
        ray.get(mailbox.warn.remote("trial 3 has lost its workers"))
        wait_for(lambda: said)
        ray.get(mailbox.warn.remote("the disk is full"))
    assert said == ["trial 3 has lost its workers", "the disk is full"]


def test_slots_that_start_together_get_numbers_of_their_own_without_waiting_for_busy_ones(cluster: None) -> None:
    import ray

    class Busy:
        """A slot's actor that is in a step."""

        def work(self) -> None:
            time.sleep(120)

    made: list[Any] = []

    def slots(n: int) -> list[Any]:
        started = [ray.remote(num_cpus=0)(Busy).remote() for _ in range(n)]
        made.extend(started)
        ray.get([slot.__ray_ready__.remote() for slot in started])
        for slot in started:
            slot.work.remote()
        return started

    async def take(mailbox: Mailbox, those: list[Any]) -> list[int]:
        takes: list[Coroutine[Any, Any, int]] = [mailbox.take_number(slot) for slot in those]
        return await asyncio.gather(*takes)

    async def numbers() -> tuple[list[int], float, list[int]]:
        mailbox, first = Mailbox("one"), slots(6)
        taken = await take(mailbox, first[:5])
        began = time.monotonic()
        taken += await take(mailbox, first[5:])
        waited = time.monotonic() - began
        for killed in first[1:3]:
            ray.kill(killed)
        time.sleep(1)
        return taken, waited, await take(mailbox, slots(2))

    try:
        taken, waited, again = asyncio.run(numbers())
    finally:
        for slot in made:
            ray.kill(slot)
    assert taken == [1, 2, 3, 4, 5, 6] and sorted(again) == [2, 3]
    assert waited < 2, "half a second, and not for each of them"
