"""A searcher driven as Ray Tune drives it, with objectives that are computed instead of trained."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from lungct_tune.config.search_space import SearchSpace, parse_space
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import open_study
from lungct_tune.experiment.study_journal import StudyStorage
from lungct_tune.experiment.trial import EpochFigures, EpochReport, Outcome, TrialOrder
from lungct_tune.tuning.searcher import OptunaSearcher
from lungct_tune.tuning.slots import ORDER, REPORT

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS = 9
SPACE = "truncation_depth: {low: 30, high: 49}\ndropout: {low: 0.0, high: 0.7}\nweight_decay: 0.5"


class RayTrial:
    """As much of Ray's trial as a scheduler is told of one that lost its actor."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id

    def get_error(self) -> Exception:
        return RuntimeError("Traceback ...\nActorDiedError: the slot died")


class Tune:
    """What Ray Tune does with a searcher, with an objective that is computed instead of trained."""

    _open: ClassVar[dict[Path, StudyStorage]] = {}
    """A study's storage is closed when another process, here another object, opens it again."""

    def __init__(self, folder: Path, text: str = SPACE, seed: int = 1) -> None:
        self.space: SearchSpace = parse_space(text, "test")
        file = folder / "study.journal"
        if file in self._open:
            self._open[file].close()
        new = not file.exists()
        self._open[file] = StudyStorage(file)
        self.study = open_study(self._open[file], "test", self.space, EPOCHS, new=new)
        experiment = Experiment.at(str(folder), "test")
        self.threads = ThreadPoolExecutor(1)
        self.search = OptunaSearcher(
            self.study, self.space, experiment, epochs=EPOCHS, seed=seed, startup=4, storage_threads=self.threads
        )
        self._ids = iter(range(10**6))

    def suggest(self, name: str) -> dict[str, Any]:
        """The order for Ray's next trial, as values."""
        order: TrialOrder = self.search.suggest(name)[ORDER]
        return order.identity | {"weights_from": order.weights_from}

    def run(self, epochs: int = EPOCHS) -> dict[str, Any]:
        """One trial, as far as the study lets it or `epochs`; then it is left as a crash leaves it."""
        name = f"ray-{next(self._ids)}"
        suggested = self.suggest(name)
        for epoch in range(1, epochs + 1):
            report = epoch_report(suggested["configuration"], epoch)
            if epoch == EPOCHS:
                self.search.on_trial_complete(name, {REPORT: report})
                break
            self.search.record(name, report)
            if self.search.should_stop(name):
                self.search.on_trial_complete(name, {REPORT: report})
                break
        return suggested


def epoch_report(configuration: dict[str, Any], *epochs: int) -> EpochReport:
    """What a slot reports of the last of these epochs, with those before it that the study may not know."""
    quality = 1 - abs(configuration["truncation_depth"] - 40) / 49 - configuration["dropout"] / 9
    figures = [
        EpochFigures(
            epoch=epoch,
            balanced_accuracy=quality * epoch / EPOCHS,
            accuracy=quality,
            log_loss=1 / epoch,
            train_loss=1.0,
            train_s=2.0,
            valid_s=0.5,
            at=1.8e9 + epoch,
            slot=1,
        )
        for epoch in epochs
    ]
    return EpochReport(Outcome.COMPLETED if epochs[-1] == EPOCHS else Outcome.RUNNING, tuple(figures))
