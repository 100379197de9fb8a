"""The task that says in Ray's dashboard how far a search is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from processes import wait_for
from trials import record

from lungct_tune.experiment.trial import Outcome
from lungct_tune.tuning.callbacks.scoreboard import ScoreboardCallback
from lungct_tune.tuning.mailbox import ENDED, Mailbox, opened_mailbox
from lungct_tune.tuning.tally import SearchTally


def test_rays_dashboard_has_one_running_task_that_says_how_many_trials_are_done_and_which_is_best(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.state import list_tasks

    def running() -> list[str]:
        tasks = list_tasks(filters=[("type", "=", "NORMAL_TASK")], detail=True, limit=10_000)
        return [task.name for task in tasks if "trials done" in task.name and task.state.startswith("RUNNING")]

    def shows(name: str) -> Callable[[], bool]:
        return lambda: running() == [name]

    monkeypatch.setattr("lungct_tune.tuning.callbacks.scoreboard.PERIOD_S", 0.0)
    tally = SearchTally([])
    with opened_mailbox("scored") as mailbox:
        board = ScoreboardCallback(mailbox, tally, 8)
        board.on_step_end(1, [])
        wait_for(shows("0 of 8 trials done"))
        tally.add(record(0, 1, 0.5, Outcome.COMPLETED))
        tally.add(record(1, 1, 0.612, Outcome.COMPLETED))
        board.on_step_end(2, [])
        wait_for(shows("2 of 8 trials done, best so far 61.2 % in trial 1"))
        board.on_step_end(3, [])
        tally.add(record(2, 1, 0.4, Outcome.COMPLETED))
        board.on_experiment_end([])
        wait_for(shows("3 of 8 trials done, best so far 61.2 % in trial 1"))
    wait_for(lambda: not running())  # the search has ended, and nothing has failed
    failed = list_tasks(filters=[("type", "=", "NORMAL_TASK"), ("state", "=", "FAILED")], detail=True, limit=10_000)
    assert not [(task.name, task.error_message) for task in failed if "trials done" in task.name]


def test_a_task_that_starts_late_is_told_all_the_same() -> None:
    """It would wait, and Ray's dashboard show two: the calls of an actor with asyncio may overtake each other."""

    async def notes() -> None:
        mailbox = Mailbox("one")
        for ended in (4, 3, 5, 6):
            await mailbox.put(("", ENDED, ended), None)
        for ended in (3, 4, 5, 6):
            await asyncio.wait_for(mailbox.get(("", ENDED, ended)), timeout=5)

    asyncio.run(notes())
