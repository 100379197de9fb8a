"""The main job: searches on images, retrains the best configuration, evaluates it once, and writes a bundle.

python -m lungct_tune.search --help
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lungct_tune.cli import exit_status
from lungct_tune.config.settings import Settings, read_settings
from lungct_tune.errors import UserError

if TYPE_CHECKING:  # imported only after the settings are checked, so that --help and errors in them answer at once
    from pathlib import Path

    import optuna
    import ray
    import torch

    from lungct_tune.data.split import DataSplit
    from lungct_tune.evaluation.bundle_files import BundleFiles
    from lungct_tune.experiment.bundle import RetrainedModel
    from lungct_tune.experiment.plan import Plan
    from lungct_tune.experiment.results import Bundle
    from lungct_tune.experiment.trial import TrialRecord
    from lungct_tune.tuning.allocation import ResourcePlan
    from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
    from lungct_tune.tuning.workers import SlotPlan


class NothingToRetrain(UserError):
    """No trial of the search ran to its end. The message says how each ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    return exit_status(lambda: search(*read_settings(argv), Console(highlight=False)))


def search(settings: Settings, given: set[str], console: Console) -> None:
    """Runs the whole job, from the images to the bundle.

    Args:
        settings: the user's settings; with `resume`, only the settings to change.
        given: the names of the fields that the user set.
        console: the terminal.

    Raises:
        UserError: a subclass from one of the packages, with a message for the user.
        KeyboardInterrupt: Ctrl-C, with a message that says how to continue.
    """
    from lungct_tune.experiment.plan import plan_search

    plan = plan_search(settings, given)
    with _with_resume_command(plan):
        split, audit = load_and_audit(plan, console)
        weights = plan.read_weights()
        with join_cluster(plan) as dashboard:
            resources = announce(plan, dashboard, console)
            if plan.settings.plan:
                return
            with start_search(plan, split, audit, resources, weights, console) as run:
                winner = run.search()
                seeds = run.repeat_with_seeds(winner)
                retrained = run.retrain(winner)
                published = run.retrain_published(winner)
                run.write_bundle(winner, retrained, published, seeds)


@contextmanager
def _with_resume_command(plan: Plan) -> Iterator[None]:
    """Adds the command that continues the search to the exception that stops a started search."""
    from lungct_tune.filesystem import NodeRefused

    try:
        yield
    except (KeyboardInterrupt, NodeRefused) as stop:
        if plan.experiment.exists("settings.yaml"):
            stop.add_note(f"To continue: {plan.resume_command}")
        raise


def load_and_audit(plan: Plan, console: Console) -> tuple[DataSplit, dict[str, Any]]:
    """Reads, groups, splits and audits the images.

    Raises:
        DataError: they cannot be used, or the settings are strict and the split leaks.
        PlanError: they are not the images that the search started with.
    """
    from lungct_tune.auditing.audit import audit_images, refuse_leaks
    from lungct_tune.data.phantoms import PHANTOMS
    from lungct_tune.reporting.console import print_data, print_verdict

    settings = plan.settings
    if settings.data is None:
        console.print(PHANTOMS, style="bold yellow", soft_wrap=True)
    split = plan.load_and_split()
    print_data(split.images, split.split, console)
    audit = audit_images(split.images, split.parts, settings.split)
    print_verdict(audit, settings, console)
    if settings.strict:
        refuse_leaks(audit)
    return split, audit


def join_cluster(plan: Plan) -> AbstractContextManager[str]:
    """Joins or starts the Ray cluster; yields the address of its dashboard.

    Raises:
        ClusterError: the cluster cannot be joined.
    """
    from lungct_tune.tuning.cluster import joined  # not before: much can be refused without importing Ray

    return joined(plan.settings.address, plan.settings.verbose, plan.experiment.name)


def announce(plan: Plan, dashboard: str, console: Console) -> ResourcePlan:
    """Prints the plan of the search and its share of the cluster; returns the slots.

    Raises:
        ClusterError: the cluster is too small.
    """
    from lungct_tune.reporting.console import print_plan, print_space
    from lungct_tune.tuning.cluster import plan_resources, plan_retraining_resources

    resources = plan_resources(plan.settings)
    retraining = plan_retraining_resources(plan.settings)
    print_plan(plan, f"{resources}; the final retraining on {retraining}", dashboard, console)
    if plan.settings.plan:
        print_space(plan.space, console)
    return resources


@contextmanager
def start_search(
    plan: Plan,
    split: DataSplit,
    audit: dict[str, Any],
    resources: ResourcePlan,
    weights: dict[str, torch.Tensor] | None,
    console: Console,
) -> Iterator[SearchRun]:
    """Starts a search: checks its storage, opens its study, writes its plan. From here on `--resume` can continue it.

    Raises:
        StorageError: a node cannot use the storage.
        StudyError, TrackingError: the study or the tracking server cannot be used.
        PlanError: another process runs this search.
    """
    from lungct_tune.evaluation.bundle_files import BundleFiles
    from lungct_tune.experiment import bundle
    from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
    from lungct_tune.tuning.cluster import check_storage, has_shared_file_system, machines
    from lungct_tune.tuning.shared_data import share_weights

    settings, experiment = plan.settings, plan.experiment
    check_storage(experiment)
    is_new = not settings.resume
    tracker = MLflowTracker(settings.track, experiment.name, new=is_new) if settings.track else None
    with ExitStack() as held:
        held.enter_context(plan.exclusive_lock())
        study = held.enter_context(plan.opened_study(new=is_new))
        study.set_user_attr("cluster", f"{resources}, on {machines()}")
        plan.save(split)
        experiment.write(bundle.AUDIT, bundle.as_json(audit))
        if tracker:
            held.enter_context(tracker.kept_up(study, console))
        yield SearchRun(
            plan=plan,
            split=split,
            resources=resources,
            study=study,
            files=BundleFiles(plan, split, audit, study, resources.slots),
            backbone=share_weights(weights),
            image_folder=plan.study_folder if has_shared_file_system(experiment) else None,
            tracker=tracker,
            console=console,
        )


@dataclass
class SearchRun:
    """A search that has started. Its methods are its steps, in their order."""

    plan: Plan
    split: DataSplit
    resources: ResourcePlan
    study: optuna.Study
    files: BundleFiles
    backbone: ray.ObjectRef[dict[str, torch.Tensor]] | None
    image_folder: Path | None
    """The folder for images that are too large for the object store; None if the nodes have no common folder."""
    tracker: MLflowTracker | None
    console: Console

    def search(self) -> TrialRecord:
        """Runs the trials; returns the best of those that ran to their end.

        Raises:
            NothingToRetrain: no trial ran to its end.
            KeyboardInterrupt, NodeRefused: see `run_search`.
        """
        from lungct_tune.experiment.study import finished_trials
        from lungct_tune.experiment.trial import best_trial
        from lungct_tune.tuning.tuner import run_search

        settings, slots = self.plan.settings, self.resources.slots
        assert settings.trials is not None  # decided by the plan
        self._announce(f"searching, {slots} trials at a time")
        run_search(
            self.study,
            self.plan.space,
            self._slot_plan,
            trials=settings.trials,
            slots=slots,
            seed=settings.seed,
            console=self.console,
            so_far=self.files.so_far,
        )
        trials = finished_trials(self.study)
        if (winner := best_trial(trials)) is None:
            reasons = [f"  trial {trial.number} {trial.ended}" for trial in trials]
            raise NothingToRetrain("\n".join(["no trial ran to its end, so there is nothing to retrain:", *reasons]))
        return winner

    def repeat_with_seeds(self, winner: TrialRecord) -> dict[str, Any] | None:
        """Trains the winner with other seeds, to see how its figures depend on the seed; None without --seeds."""
        from lungct_tune.experiment.study import over_seeds
        from lungct_tune.tuning.rerun import rerun_with_seeds

        settings = self.plan.settings
        if not settings.seeds or settings.epochs is None:
            return None
        self._announce(f"training trial {winner.number} again, with {settings.seeds} other seeds")
        seeds = [(settings.seed + k) % 2**32 for k in range(1, settings.seeds + 1)]
        plan, slots = self._slot_plan, self.resources.slots
        return over_seeds(rerun_with_seeds(plan, self._seeds_folder, winner, seeds, settings.epochs, slots))

    def retrain(self, trial: TrialRecord) -> RetrainedModel:
        """Retrains a trial's hyperparameters on train and validation, and predicts the test split once.

        Raises:
            RetrainingFailed, KeyboardInterrupt: see `retrain_and_predict`.
        """
        import numpy as np

        from lungct_tune.tuning.cluster import plan_retraining_resources
        from lungct_tune.tuning.retrain import RetrainPlan, retrain_and_predict
        from lungct_tune.tuning.shared_data import share_dataset

        assert trial.best is not None  # it completed
        plan, split, epochs = self.plan, self.split, trial.best.epoch
        self._announce(f"retraining trial {trial.number} on train and validation, {epochs} epochs")
        resources = plan_retraining_resources(plan.settings)  # nodes may have come and gone
        rows, file = np.arange(len(split.split)), self._file("all-images.npy")
        retrain_plan = RetrainPlan(
            experiment=plan.experiment,
            dataset=share_dataset(plan.settings, split.images, rows, self.backbone, epochs, file),
            hyperparameters=trial.hyperparameters,
            seed=plan.settings.seed,
            train_rows=split.searched_rows,
            test_rows=split.test_rows,
            workers=resources.workers,
            resources_per_worker=resources.resources_per_worker,
        )
        return retrain_and_predict(retrain_plan, name=f"trial_{trial.number:04d}_{epochs:03d}_epochs")

    def retrain_published(self, winner: TrialRecord) -> tuple[TrialRecord, RetrainedModel] | None:
        """Retrains the published configuration too; returns its trial and the model. None if there is no comparison."""
        from lungct_tune.experiment.study import finished_trials
        from lungct_tune.experiment.trial import BASELINE, best_trial

        if not self.plan.settings.compare_baseline:
            return None
        if winner.number == BASELINE:
            self.console.print("the winner is the published configuration, so it is not compared with that")
            return None
        published = best_trial(trial for trial in finished_trials(self.study) if trial.number == BASELINE)
        if published is None:
            self.console.print("the published configuration did not run to its end, so there is no comparison with it")
            return None
        return published, self.retrain(published)

    def write_bundle(
        self,
        winner: TrialRecord,
        retrained: RetrainedModel,
        published: tuple[TrialRecord, RetrainedModel] | None,
        seeds: dict[str, Any] | None,
    ) -> None:
        """Evaluates the final model, writes the bundle with its pages, and prints the outcome."""
        from lungct_tune.experiment import bundle
        from lungct_tune.filesystem import StorageError
        from lungct_tune.reporting.console import print_outcome

        plan, experiment = self.plan, self.plan.experiment
        final = self.files.final(winner, retrained, published, seeds)
        bundle.write_bundle(experiment, self.files.files(final) | self._pages(final))
        with suppress(StorageError):  # a folder that stays there is never read again
            experiment.delete_folder(bundle.SO_FAR)
            experiment.delete_folder(self._seeds_folder)
        if self.tracker and winner.best and final.metrics.test:
            self.tracker.add_final(winner.number, winner.hyperparameters, winner.best.epoch, final.metrics.test)
        print_outcome(plan, final.metrics, self.console)

    def _pages(self, final: Bundle) -> dict[str, bytes]:
        """Makes report.html and the model card."""
        from lungct_tune.experiment.bundle import CARD, REPORT
        from lungct_tune.experiment.results import gather_results
        from lungct_tune.reporting.model_card import model_card
        from lungct_tune.reporting.report_page import report_page
        from lungct_tune.reporting.test_section import Pictures

        name = self.plan.experiment.name
        try:
            results = gather_results(self.plan.experiment, self.study, final)
            return {REPORT: report_page(name, results, Pictures(self.split.images)), CARD: model_card(name, results)}
        except Exception as error:  # an error in a page must not lose the model
            message = f"the bundle has no report.html: {error!r}"
            self.console.print(message, style="yellow", soft_wrap=True, markup=False)
            return {}

    @cached_property
    def _slot_plan(self) -> SlotPlan:
        from lungct_tune.tuning.tuner import make_slot_plan

        return make_slot_plan(self.plan, self.split, self.backbone, self.resources, self._file("search-images.npy"))

    def _file(self, name: str) -> Path | None:
        return self.image_folder / name if self.image_folder else None

    @property
    def _seeds_folder(self) -> str:
        return f"{self.plan.experiment.name}-seeds"

    def _announce(self, step: str) -> None:
        self.console.print(f"\n{step}", style="bold")


if __name__ == "__main__":
    sys.exit(main())
