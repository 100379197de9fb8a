"""The steps of a search, from its start to its bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import optuna

from lungct_tune.auditing.findings import Audit
from lungct_tune.data.split import DataSplit
from lungct_tune.display import Display, print_prose
from lungct_tune.errors import UserError, number_of
from lungct_tune.experiment import bundle
from lungct_tune.experiment.bundle import RetrainedModel
from lungct_tune.experiment.metrics import SeedComparison
from lungct_tune.experiment.plan import Plan
from lungct_tune.experiment.results import Bundle, gather_results
from lungct_tune.experiment.study import finished_trials, read_trials
from lungct_tune.experiment.trial import BASELINE, TrialRecord, best_trial
from lungct_tune.filesystem import StorageError
from lungct_tune.reporting.console import print_disk_use, print_outcome, print_start
from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
from lungct_tune.tuning.cluster import check_storage, has_shared_file_system
from lungct_tune.tuning.final_slots import FinalSlots, nears_end
from lungct_tune.tuning.mailbox import news_exchanged, opened_mailbox
from lungct_tune.tuning.outlook import Outlook
from lungct_tune.tuning.rerun import rerun_with_seeds, seeds_folder
from lungct_tune.tuning.retrain import orders_of
from lungct_tune.tuning.shared_data import SharedDataset, share_dataset
from lungct_tune.tuning.slot_plan import SlotPlan
from lungct_tune.tuning.time_left import TimeLeft
from lungct_tune.tuning.tuner import make_slot_plan, run_search

if TYPE_CHECKING:
    import torch

    from lungct_tune.evaluation.bundle_files import BundleFiles


class NothingToRetrain(UserError):
    """No trial of the search ran to its end. The message says how each ended."""


@contextmanager
def start_search(
    plan: Plan,
    split: DataSplit,
    audit: Audit,
    outlook: Outlook,
    weights: dict[str, torch.Tensor] | None,
    tracker: MLflowTracker | None,
    display: Display,
) -> Iterator[SearchRun]:
    """Starts a search: checks its storage, opens its study, writes its plan, shares its images with the workers.

    From here on `--resume` can continue it. All images are shared now, so that images that do not fit are refused now.

    Raises:
        PlanError, StorageError: see `Plan`; or a node cannot use the storage, or the images do not fit.
        StudyError: the study cannot be used.
    """
    settings, experiment = plan.settings, plan.experiment
    with ExitStack() as held, ExitStack() as preparing:
        preparing.enter_context(display.step("preparing the search"))
        held.enter_context(plan.locked(partial(print_prose, display.console)))
        check_storage(experiment)  # after the lock: it deletes a file that workers of another process may look for
        study = held.enter_context(plan.opened_study())
        plan.check_weights(study)
        outlook.keep(study, new=plan.is_new)
        plan.save(split)
        experiment.write(bundle.AUDIT, bundle.as_json(audit.as_dict()))
        if tracker:
            held.enter_context(tracker.kept_up(study, display.console))
        folder = experiment.local_folder if has_shared_file_system(experiment) else None
        search_file, test_file = (folder and folder / f"{name}-images.npy" for name in ("search", "test"))
        mailbox = held.enter_context(opened_mailbox(experiment.name))
        held.enter_context(news_exchanged(mailbox, partial(print_prose, display.console, style="yellow")))
        slot_plan = make_slot_plan(plan, split, weights, outlook.resources, mailbox, search_file)
        test = share_dataset(settings, split.images, split.test_rows, None, test_file, besides=slot_plan.dataset)
        preparing.close()
        yield SearchRun(plan, split, audit, outlook, study, slot_plan, test, tracker, display)


@dataclass
class SearchRun:
    """A search that has started. Its methods are its steps, in their order."""

    plan: Plan
    split: DataSplit
    audit: Audit
    outlook: Outlook
    study: optuna.Study
    slot_plan: SlotPlan
    test: SharedDataset
    """The images of test, which only the retraining gets."""
    tracker: MLflowTracker | None
    display: Display

    def search(self) -> TrialRecord:
        """Runs the trials; returns the best of those that ran to their end.

        Raises:
            NothingToRetrain: no trial ran to its end.
            KeyboardInterrupt, NodeRefused: see `run_search`.
        """
        work = self.outlook.work
        print_start(self.plan, work.slots, len(finished_trials(self.study)), self.display.console)
        run_search(
            self.study,
            self.plan.space,
            self.slot_plan,
            trials=work.trials,
            slots=work.slots,
            seed=self.plan.settings.seed,
            display=self.display,
            left=self._left,
            so_far=lambda best, weights: self._files.so_far(best, weights),
        )
        self._left.search_ended()
        if (winner := best_trial(trials := finished_trials(self.study))) is None:
            reasons = [f"  trial {trial.number} {trial.ended}" for trial in trials]
            raise NothingToRetrain("\n".join(["no trial ran to its end, so there is nothing to retrain:", *reasons]))
        return winner

    def repeat_with_seeds(self, winner: TrialRecord, slots: FinalSlots) -> SeedComparison | None:
        """Trains winner and published configuration with other seeds, see `rerun_with_seeds`; None without --seeds.

        The slots of the retrainings give their room back before.
        """
        settings = self.plan.settings
        if not settings.seeds:
            return None
        slots.release()
        published = self._published(winner)
        what = "winner and published configuration" if published else "the winner"
        self._announce(f"training {what} again, with {settings.seeds} other seeds{' each' if published else ''}")
        seeds = [(settings.seed + k) % 2**32 for k in range(1, settings.seeds + 1)]
        plan, at_once = self.slot_plan, self.outlook.work.slots
        with self._shown(f"training with {settings.seeds} other seeds", announced=True):
            return rerun_with_seeds(plan, winner, published, seeds, at_once, self._left)

    def final_slots(self) -> FinalSlots:
        """The slots of the retrainings. The first may start before the search has ended."""
        work, resources = self.outlook.work, self.outlook.retraining
        plan = replace(self.slot_plan, workers=resources.workers, resources_per_worker=resources.resources_per_worker)
        soon = partial(nears_end, self.study, work.trials, work.slots, self._left)
        return FinalSlots(plan, work.final_slots, soon, partial(import_module, "lungct_tune.reporting.report_page"))

    def retrain(
        self, winner: TrialRecord, slots: FinalSlots
    ) -> tuple[list[RetrainedModel], tuple[TrialRecord, list[RetrainedModel]] | None]:
        """Retrains the winner, and for a comparison the published configuration; predicts test once with each model.

        Returns: the winner's models, several for an ensemble; if there is a comparison, the other trial and its models.

        Raises:
            RetrainingFailed: see `FinalSlots.retrain`.
        """
        settings = self.plan.settings
        orders = orders_of(settings, winner, self.test)
        how = f"for an ensemble of {len(orders)} models" if settings.ensemble else "on train and validation"
        try:  # from the first word on, so that a stop at any moment says what is kept
            self._announce(f"retraining trial {winner.number} {how}, {number_of(len(winner.history), 'epoch')}")
            published = self._compared(winner)
            others = orders_of(settings, published, self.test) if published else []
            self._left.retrain({order.folder: order.hyperparameters for order in orders + others})
            showing = self.display.showing(self._left.retraining_bar)
            with self._shown(f"retraining trial {winner.number}", announced=True), showing:
                models, theirs = slots.retrain(orders, others, self._prepare_bundle, self._left.retrained)
        except KeyboardInterrupt:
            self._warn("stopping; the retraining continues from the last state that it has saved")
            raise
        return models, (published, theirs) if published and theirs else None

    def _compared(self, winner: TrialRecord) -> TrialRecord | None:
        """The trial that is retrained for a comparison with the winner; None if there is none."""
        if not self.outlook.work.compares:
            return None
        how = "is retrained in the same way, for the comparison"
        if (published := self._published(winner)) is None:
            why = "is the winner" if winner.number == BASELINE else "did not run to its end"
            how = f"{why}, so there is no comparison with it"
        self.display.console.print(f"the published configuration {how}")
        return published

    def _published(self, winner: TrialRecord) -> TrialRecord | None:
        """The trial of the published configuration; None if it is the winner, or did not run to its end."""
        return best_trial(t for t in finished_trials(self.study) if t.number == BASELINE != winner.number)

    def write_bundle(
        self,
        winner: TrialRecord,
        retrained: list[RetrainedModel],
        published: tuple[TrialRecord, list[RetrainedModel]] | None,
        seeds: SeedComparison | None,
    ) -> None:
        """Evaluates the final model, writes the bundle with its pages, and prints the outcome."""
        plan, experiment = self.plan, self.plan.experiment
        self._left.report()
        with self._shown("evaluating the model, drawing the report"):
            final = self._files.final(winner, retrained, published, seeds)
            bundle.write_bundle(experiment, self._files.files(final) | self._pages(final))
            with suppress(StorageError):  # a folder that stays there is never read again
                experiment.delete_folder(bundle.SO_FAR)
                experiment.delete_folder(seeds_folder(experiment))
        if self.tracker and final.metrics.test:
            self.tracker.add_final(winner.number, winner.hyperparameters, len(winner.history), final.metrics.test)
        print_outcome(plan, final.metrics, self.study, self.display.console)
        print_disk_use(experiment, self.display.console)

    def _prepare_bundle(self) -> None:
        """Makes what the bundle needs and does not depend on the final model, while that is trained."""
        with suppress(Exception):  # it is tried again for the bundle, and an error is raised or printed then
            self._files.prepare()
            self._parts_of_search  # noqa: B018

    def _pages(self, final: Bundle) -> dict[str, bytes]:
        """Makes report.html and the model card."""
        from lungct_tune.reporting.model_card import model_card
        from lungct_tune.reporting.report_page import report_page
        from lungct_tune.reporting.test_section import Pictures

        name = self.plan.experiment.name
        try:
            results = gather_results(self.plan.experiment, self.study, final)
            page = report_page(name, results, Pictures(self.split.images), self._parts_of_search)
            return {bundle.REPORT: page, bundle.CARD: model_card(name, results)}
        except Exception as error:  # an error in a page must not lose the model
            self._warn(f"the bundle has no report.html: {error!r}")
            return {}

    @cached_property
    def _files(self) -> BundleFiles:
        from lungct_tune.evaluation.bundle_files import BundleFiles  # imports torch, which no slot should wait for

        return BundleFiles(self.plan, self.split, self.audit, self.study, self.outlook.resources.slots)

    @cached_property
    def _parts_of_search(self) -> dict[str, Any]:
        from lungct_tune.reporting.report_page import parts_of_search

        return parts_of_search(gather_results(self.plan.experiment, self.study, None))

    @cached_property
    def _left(self) -> TimeLeft:
        return TimeLeft(self.outlook.work, read_trials(self.study), self.outlook.forecast)

    @contextmanager
    def _shown(self, step: str, *, announced: bool = False) -> Iterator[None]:
        """Shows a step after the search, and the time left."""
        with self.display.showing(self._left.bar), self.display.step(step, announced=announced):
            yield

    def _warn(self, sentence: str) -> None:
        print_prose(self.display.console, sentence, "yellow")

    def _announce(self, step: str) -> None:
        self.display.console.print(f"\n{step}", style="bold")
