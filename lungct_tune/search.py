"""The main job: searches on images, retrains the best configuration, evaluates it once, and writes a bundle.

python -m lungct_tune.search --help
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lungct_tune.cli import exit_status, terminal
from lungct_tune.config.settings import Settings, read_settings
from lungct_tune.errors import SearchStopped, UserError

if TYPE_CHECKING:  # imported only after the settings are checked, so that --help and errors in them answer at once
    import optuna
    import torch

    from lungct_tune.data.split import DataSplit
    from lungct_tune.evaluation.bundle_files import BundleFiles
    from lungct_tune.experiment.bundle import RetrainedModel
    from lungct_tune.experiment.plan import Plan
    from lungct_tune.experiment.results import Bundle
    from lungct_tune.experiment.trial import TrialRecord
    from lungct_tune.tuning.allocation import ResourcePlan
    from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
    from lungct_tune.tuning.retrain import EarlySlot
    from lungct_tune.tuning.shared_data import SharedDataset
    from lungct_tune.tuning.workers import SlotPlan


class NothingToRetrain(UserError):
    """No trial of the search ran to its end. The message says how each ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # what a scheduler sends is a Ctrl-C
    return exit_status(lambda: search(*read_settings(argv), terminal()))


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
    with _with_resume_command(plan), join_cluster(plan) as dashboard:
        split, audit = load_and_audit(plan, console)
        weights = plan.read_weights()
        resources = announce(plan, dashboard.result(), console)
        if plan.settings.plan:
            return
        with start_search(plan, split, audit, resources, weights, console) as run, run.early_slot() as slot:
            winner = run.search()
            retrained = run.retrain(winner, slot)
            published = run.retrain_published(winner, slot)
            seeds = run.repeat_with_seeds(winner, slot)
            run.write_bundle(winner, retrained, published, seeds)


@contextmanager
def _with_resume_command(plan: Plan) -> Iterator[None]:
    """Adds the command that continues the search to the exception that stops a started search."""
    from lungct_tune.filesystem import NodeRefused

    try:
        yield
    except (KeyboardInterrupt, NodeRefused, SearchStopped) as stop:
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
    audit = audit_images(split.images, split.parts, "file" if settings.split_file else settings.split)
    print_verdict(audit, settings, console)
    if settings.strict:
        refuse_leaks(audit)
    return split, audit


@contextmanager
def join_cluster(plan: Plan) -> Iterator[Future[str]]:
    """Joins or starts the Ray cluster in a thread, while the images are read; yields its dashboard's future address.

    Images that are refused in the first half second start no cluster.

    Raises:
        ClusterError: from the future: the cluster cannot be joined.
    """
    # imported here and not by two threads at once: packages that import each other in a circle can fail then
    import lungct_tune.auditing.audit
    import lungct_tune.reporting.console  # noqa: F401
    from lungct_tune.tuning.cluster import joined

    refused = Event()

    def join() -> str:
        if refused.wait(timeout=0.5):
            return ""
        return cluster.enter_context(joined(plan.settings.address, plan.settings.verbose, plan.experiment.name))

    # Linux ends the processes of a cluster together with the thread that started them, so the thread stays until then
    with ThreadPoolExecutor(1) as thread, ExitStack() as cluster:
        joining = thread.submit(join)
        try:
            yield joining
        finally:
            refused.set()
            wait([joining])


def announce(plan: Plan, dashboard: str, console: Console) -> ResourcePlan:
    """Prints the plan of the search and its share of the cluster; returns the slots.

    Raises:
        ClusterError: the cluster is too small.
    """
    from lungct_tune.reporting.console import print_plan, print_space
    from lungct_tune.tuning.cluster import plan_resources, plan_retraining_resources

    resources = plan_resources(plan.settings)
    retraining = plan_retraining_resources(plan.settings)
    head = f"the head needs {resources.head_memory / 2**30:.1f} GiB of memory for its part of the slots"
    print_plan(plan, f"{resources}; the final retraining on {retraining}; {head}", dashboard, console)
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
    """Starts a search: checks its storage, opens its study, writes its plan, shares its images with the workers.

    From here on `--resume` can continue it. All images are shared now, so that images that do not fit are refused now.

    Raises:
        StorageError: a node cannot use the storage, or the images do not fit.
        StudyError, TrackingError: the study or the tracking server cannot be used.
        PlanError: another process runs this search.
    """
    from lungct_tune.experiment import bundle
    from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
    from lungct_tune.tuning.cluster import check_storage, has_shared_file_system, machines
    from lungct_tune.tuning.shared_data import share_dataset, share_weights
    from lungct_tune.tuning.tuner import make_slot_plan

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
        folder = plan.study_folder if has_shared_file_system(experiment) else None
        search_file, test_file = (folder and folder / f"{name}-images.npy" for name in ("search", "test"))
        slot_plan = make_slot_plan(plan, split, share_weights(weights), resources, search_file)
        yield SearchRun(
            plan=plan,
            split=split,
            audit=audit,
            resources=resources,
            study=study,
            slot_plan=slot_plan,
            test=share_dataset(settings, split.images, split.test_rows, None, test_file, besides=slot_plan.dataset),
            tracker=tracker,
            console=console,
        )


@dataclass
class SearchRun:
    """A search that has started. Its methods are its steps, in their order."""

    plan: Plan
    split: DataSplit
    audit: dict[str, Any]
    resources: ResourcePlan
    study: optuna.Study
    slot_plan: SlotPlan
    test: SharedDataset
    """The images of test, which only the retraining gets."""
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
            self.slot_plan,
            trials=settings.trials,
            slots=slots,
            seed=settings.seed,
            console=self.console,
            so_far=lambda best, weights: self._files.so_far(best, weights),
        )
        trials = finished_trials(self.study)
        if (winner := best_trial(trials)) is None:
            reasons = [f"  trial {trial.number} {trial.ended}" for trial in trials]
            raise NothingToRetrain("\n".join(["no trial ran to its end, so there is nothing to retrain:", *reasons]))
        return winner

    def repeat_with_seeds(self, winner: TrialRecord, slot: EarlySlot) -> dict[str, Any] | None:
        """Trains the winner with other seeds, to see how its figures depend on the seed; None without --seeds.

        The slot of the retraining gives its room back before.
        """
        from lungct_tune.experiment.study import over_seeds
        from lungct_tune.tuning.rerun import rerun_with_seeds

        settings = self.plan.settings
        if not settings.seeds or settings.epochs is None:
            return None
        slot.release()
        self._announce(f"training trial {winner.number} again, with {settings.seeds} other seeds")
        seeds = [(settings.seed + k) % 2**32 for k in range(1, settings.seeds + 1)]
        plan, slots = self.slot_plan, self.resources.slots
        return over_seeds(rerun_with_seeds(plan, self._seeds_folder, winner, seeds, settings.epochs, slots))

    def early_slot(self) -> EarlySlot:
        """The slot of the retraining, which may start before the search has ended."""
        from lungct_tune.tuning.cluster import plan_retraining_resources
        from lungct_tune.tuning.retrain import EarlySlot

        settings = self.plan.settings
        assert settings.trials is not None  # decided by the plan
        resources = plan_retraining_resources(settings)
        plan = replace(self.slot_plan, workers=resources.workers, resources_per_worker=resources.resources_per_worker)

        def trials_so_far() -> tuple[int, int]:
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            return sum(state.name != "WAITING" for state in states), sum(state.is_finished() for state in states)

        def import_pages() -> None:
            import lungct_tune.reporting.report_page  # noqa: F401

        last = (settings.trials, max(1, settings.trials - self.resources.slots))
        return EarlySlot(plan, trials_so_far, last, import_pages, self._warn)

    def retrain(self, trial: TrialRecord, slot: EarlySlot) -> RetrainedModel:
        """Retrains a trial's hyperparameters on train and validation, and predicts the test split once.

        Raises:
            RetrainingFailed: see `retrain_and_predict`.
        """
        from lungct_tune.tuning.retrain import RetrainOrder, retrain_and_predict

        settings, epochs = self.plan.settings, len(trial.history)
        self._announce(f"retraining trial {trial.number} on train and validation, {epochs} epochs")
        hyperparameters, interval = trial.hyperparameters, settings.checkpoint_interval
        order = RetrainOrder(trial.number, hyperparameters, settings.seed, epochs, self.test, interval)
        return retrain_and_predict(self.plan.experiment, order, slot, self._prepare_bundle)

    def retrain_published(self, winner: TrialRecord, slot: EarlySlot) -> tuple[TrialRecord, RetrainedModel] | None:
        """Retrains the published configuration too; returns its trial and the model. None if there is no comparison."""
        from lungct_tune.experiment.study import finished_trials
        from lungct_tune.experiment.trial import BASELINE, best_trial

        if not (self.plan.settings.compare_baseline or self.plan.settings.data is None):
            return None
        if winner.number == BASELINE:
            self.console.print("the winner is the published configuration, so it is not compared with that")
            return None
        published = best_trial(trial for trial in finished_trials(self.study) if trial.number == BASELINE)
        if published is None:
            self.console.print("the published configuration did not run to its end, so there is no comparison with it")
            return None
        return published, self.retrain(published, slot)

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
        final = self._files.final(winner, retrained, published, seeds)
        bundle.write_bundle(experiment, self._files.files(final) | self._pages(final))
        with suppress(StorageError):  # a folder that stays there is never read again
            experiment.delete_folder(bundle.SO_FAR)
            experiment.delete_folder(self._seeds_folder)
        if self.tracker and final.metrics.test:
            self.tracker.add_final(winner.number, winner.hyperparameters, len(winner.history), final.metrics.test)
        print_outcome(plan, final.metrics, self.console)

    def _prepare_bundle(self) -> None:
        """Makes what the bundle needs and does not depend on the final model, while that is trained."""
        with suppress(Exception):  # it is tried again for the bundle, and an error is raised or printed then
            self._files.prepare()
            self._parts_of_search  # noqa: B018

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
            page = report_page(name, results, Pictures(self.split.images), self._parts_of_search)
            return {REPORT: page, CARD: model_card(name, results)}
        except Exception as error:  # an error in a page must not lose the model
            self._warn(f"the bundle has no report.html: {error!r}")
            return {}

    @cached_property
    def _files(self) -> BundleFiles:
        from lungct_tune.evaluation.bundle_files import BundleFiles  # imports torch, which no slot should wait for

        return BundleFiles(self.plan, self.split, self.audit, self.study, self.resources.slots)

    @cached_property
    def _parts_of_search(self) -> dict[str, Any]:
        from lungct_tune.experiment.results import gather_results
        from lungct_tune.reporting.report_page import parts_of_search

        return parts_of_search(gather_results(self.plan.experiment, self.study, None))

    @property
    def _seeds_folder(self) -> str:
        return f"{self.plan.experiment.name}-seeds"

    def _warn(self, sentence: str) -> None:
        self.console.print(sentence, style="yellow", soft_wrap=True, markup=False)

    def _announce(self, step: str) -> None:
        self.console.print(f"\n{step}", style="bold")


if __name__ == "__main__":
    sys.exit(main())
