"""The mailbox of a job: one actor on the head, through which slots, their workers and the driver talk."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from math import inf
from threading import Event, Thread
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungct_tune.stopping import stop_delayed, was_asked
from lungct_tune.tuning.ray_compat import draining_nodes

Address = tuple[str, str, int]
"""To whom or of whom, kind of letter, number."""

ORDER, REPORT = OF_GROUPS = "order", "report"
"""Kinds of letters to and of a group of workers. They are dropped when it is closed."""

DRAIN, ENDED = "drain", "ended"
"""Kinds of letters that stay: to the workers on a node that will be lost, and to a task of the scoreboard."""

ANSWER_S = 30.0
"""How long a mailbox gets to answer."""

NEWS_EVERY_S = 1.0
"""How often the driver and the workers exchange news."""

MANY = 100_000
"""Requests that may wait at the same time: some for each worker of each slot."""


CLOSED = "this group of workers has been closed"


_Call = TypeVar("_Call")


def _unlisted(call: _Call) -> _Call:
    """Marks a call that Ray's dashboard does not list: there are so many that trials could not be found among them."""
    decorate: Any = ray.method(enable_task_events=False)
    marked: _Call = decorate(call)
    return marked


class Mailbox:
    """Passes letters on, each to all who ask for it. Whoever asks first waits until the letter is there.

    Args:
        name: is shown in Ray's dashboard.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._letters: defaultdict[Address, asyncio.Future[Any]] = defaultdict(asyncio.Future)
        self._open: set[str] = set()
        self._slots: dict[int, Any] = {}
        self._nodes: defaultdict[str, set[str]] = defaultdict(set)
        self._refusing: defaultdict[str, set[str]] = defaultdict(set)
        self._losses: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        """By node and slot: what has been lost since workers reported last. With slot "": what of all slots."""
        self._avoided: set[str] = set()
        self._warnings: list[str] = []
        self._warned: set[str] = set()
        self._epochs: dict[str, int] = {}

    def __repr__(self) -> str:
        return self._name

    async def take_number(self, slot: Any) -> int:
        """The lowest number that no living slot has.

        Args:
            slot: the slot's actor.
        """
        known = dict(self._slots)
        lives = dict(zip(known, await asyncio.gather(*map(self._lives, known.values())), strict=True))
        # others may have taken or returned numbers meanwhile
        dead = {number for number in known if not lives[number] and self._slots.get(number) is known[number]}
        number = next(number for number in count(1) if number not in self._slots or number in dead)
        self._slots[number] = slot
        return number

    async def take_back(self, slot: Any, number: int, avoided: set[str]) -> None:
        """Takes from a slot what a mailbox that was lost knew: the slot's number, and nodes that are left alone."""
        self._slots[number] = slot
        self._avoided |= avoided

    async def return_number(self, number: int) -> None:
        self._slots.pop(number, None)

    async def _lives(self, slot: Any) -> bool:
        """Whether an actor lives. A living one answers, or is busy."""
        try:
            await asyncio.wait_for(slot.__ray_ready__.remote(), timeout=0.5)
        except TimeoutError:
            return True
        except ray.exceptions.RayError:  # an OutOfMemoryError if Ray's memory monitor has killed it
            return False
        return True

    @_unlisted
    async def put(self, address: Address, letter: Any) -> None:
        """Puts a letter. A group's letters of the same kind two numbers before it have been read, and are dropped."""
        group, kind, number = address
        if kind in OF_GROUPS and group not in self._open:
            return
        if kind == REPORT:
            for node in self._nodes[group]:
                for slot in ("", _slot_of(group)):
                    self._losses.pop((node, slot), None)
        future = self._letters[address]
        if not future.done():
            future.set_result(letter)
        if kind in OF_GROUPS:
            self._letters.pop((group, kind, number - 2), None)

    async def get(self, address: Address) -> Any:
        """The letter at this address.

        Raises:
            RuntimeError: the group of workers has been closed, or it is older than this mailbox.
        """
        if address[1] in OF_GROUPS and address[0] not in self._open:
            raise RuntimeError(CLOSED)
        return await asyncio.shield(self._letters[address])

    async def open(self, group: str) -> None:
        """Takes letters of a group of workers from now on. A mailbox that was started again knows no older group."""
        self._open.add(group)

    async def close(self, group: str) -> None:
        """Ends all waiting for letters of a group of workers with an error. Workers that start later get it too."""
        self._open.discard(group)
        for address in [address for address in self._letters if address[0] == group]:
            future = self._letters.pop(address)
            if not future.done():
                future.set_exception(RuntimeError(CLOSED))
                future.exception()  # so that a letter that nobody waits for is not reported as an unseen error

    async def start(self, group: str, node: str) -> None:
        """Notes that a worker of the group has started on a node."""
        self._nodes[group].add(node)

    @_unlisted
    async def has_started(self, group: str) -> bool:
        """Whether a worker of the group has started."""
        return bool(self._nodes.get(group))

    async def refuse(self, group: str, node: str) -> None:
        """Notes that a node of the group cannot use the storage."""
        self._refusing[group].add(node)

    async def lose(self, group: str, what: str | None) -> dict[str, float]:
        """Notes that the group has been lost.

        Args:
            what: the name of the trial or retraining; None if the nodes are not to blame.

        Returns:
            For each of its nodes, how many of these have been lost there since workers there reported last: of all
            slots or of this slot, whichever is more. If one of several GPUs of a node is broken, the slots on the
            others report. Infinity for a node that has refused.
        """
        nodes, refusing = self._nodes.pop(group, set()), self._refusing.pop(group, set())
        lost: dict[str, float] = {}
        for node in nodes:
            counts = self._losses[node, ""], self._losses[node, _slot_of(group)]
            if what is not None:
                for lost_there in counts:
                    lost_there.add(what)
            lost[node] = inf if node in refusing else max(map(len, counts))
        return lost

    async def avoid(self, nodes: set[str]) -> set[str]:
        """Adds nodes on which no worker may start any more; returns all of them."""
        self._avoided |= nodes
        return self._avoided

    async def warn(self, sentence: str) -> None:
        """Leaves a sentence for the user. The same sentence is said once: while a storage is away, it comes often."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._warnings.append(sentence)

    async def note_epoch(self, retraining: str, epoch: int) -> None:
        """Notes the last epoch of a retraining."""
        self._epochs[retraining] = epoch

    @_unlisted
    async def epochs_of(self, retrainings: Sequence[str]) -> dict[str, int]:
        """The last epoch of each of these retrainings; 0 if none has ended."""
        return {retraining: self._epochs.get(retraining, 0) for retraining in retrainings}

    @_unlisted
    async def exchange(self, draining: set[str]) -> list[str]:
        """Tells workers that their nodes will be lost; returns the sentences for the user since the last call."""
        for node in draining:
            await self.put((node, DRAIN, 0), None)
        warnings, self._warnings = self._warnings, []
        return warnings


def _slot_of(group: str) -> str:
    """The slot of a group of workers, whose id is the slot's name and a random number."""
    return group.rpartition("-")[0]


@contextmanager
def opened_mailbox(search: str) -> Iterator[Any]:
    """Makes the mailbox of a job, and ends it afterwards.

    If it is lost, Ray starts it again. Then all slots start new workers, and tell it what they know.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=MANY, max_restarts=-1, scheduling_strategy=here)
    mailbox: Any = actor.remote(f"{search} mailbox")
    try:
        yield mailbox
    finally:
        ray.kill(mailbox)


@contextmanager
def news_exchanged(mailbox: Any, say: Callable[[str], None]) -> Iterator[None]:
    """In a thread: workers hear that their nodes will be lost, and the user hears what slots and workers have to say.

    Args:
        say: is called with each sentence.
    """
    ended = Event()

    def exchange() -> None:
        with suppress(ray.exceptions.RayError):  # the mailbox may be starting again
            for sentence in ray.get(mailbox.exchange.remote(draining_nodes()), timeout=ANSWER_S):
                say(sentence)

    def exchange_to_the_end() -> None:
        while not ended.wait(NEWS_EVERY_S):
            exchange()
        if not was_asked():  # else Ray's own processes may have got the same signal, and not answer
            exchange()

    thread = Thread(target=exchange_to_the_end, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        with stop_delayed():  # see `SlotQueue.end`
            thread.join(timeout=ANSWER_S)
