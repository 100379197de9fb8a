"""The main job: images in, a search, the best configuration retrained, judged once, one bundle out.

python -m lungct_tune.search --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import numpy as np
from optuna.trial import FrozenTrial
from rich.console import Console

from lungct_tune.cli import exit_status
from lungct_tune.config.settings import Settings, read_settings
from lungct_tune.data.phantoms import PHANTOMS
from lungct_tune.errors import UserError
from lungct_tune.experiment.bundle import CARD, REPORT, RetrainedModel
from lungct_tune.experiment.results import SearchResults, gather_results
from lungct_tune.experiment.study import (
    BASELINE,
    best_figures,
    best_trial,
    finished_trials,
    hyperparameters_of,
    open_study,
    over_seeds,
)
from lungct_tune.reporting.model_card import model_card
from lungct_tune.reporting.report_page import report_page
from lungct_tune.reporting.test_section import Pictures


class NothingToRetrain(UserError):
    """No trial of the search ran to its end; the message says how each ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    return exit_status(lambda: search(*read_settings(argv), Console(highlight=False)))


def search(settings: Settings, given: set[str], console: Console) -> None:
    """The whole journey.

    Args:
        settings: what the user chose; with `resume`, only what the user wants to change.
        given: the names of the fields that the user chose.
        console: where the user looks.

    Raises:
        UserError: each room's own, with a message for the user.
        KeyboardInterrupt: Ctrl-C, with a message that says how to go on.
    """
    # imported when the settings are known to be right: --help and slips answer at once
    import ray

    from lungct_tune.auditing.audit import audit_images, refuse_leaks
    from lungct_tune.evaluation.bundle_files import BundleFiles
    from lungct_tune.experiment import bundle
    from lungct_tune.experiment.plan import plan_search
    from lungct_tune.filesystem import StorageError
    from lungct_tune.models.pretrained import read_covering
    from lungct_tune.reporting import console as terminal
    from lungct_tune.tuning.callbacks.best_so_far import BestSoFarCallback
    from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
    from lungct_tune.tuning.cluster import (
        check_storage,
        connect,
        has_shared_file_system,
        machines,
        plan_resources,
        plan_retraining_resources,
    )
    from lungct_tune.tuning.rerun import train_again
    from lungct_tune.tuning.retrain import FinalPlan, retrain_and_predict
    from lungct_tune.tuning.shared_data import SharedDataset, share_dataset
    from lungct_tune.tuning.trial_runner import Fold
    from lungct_tune.tuning.tuner import run_search
    from lungct_tune.tuning.workers import NodeRefused, SlotPlan

    # ---- what is asked for ----------------------------------------------------------------------------
    plan = plan_search(settings, given)
    settings, experiment = plan.settings, plan.experiment
    assert settings.image_size and settings.batch_size and settings.trials and settings.epochs  # decided by the plan
    started_here, kept_alone = not ray.is_initialized(), ExitStack()
    try:
        # ---- images: found, decoded once, grouped, split ----------------------------------------------
        if settings.data is None:
            console.print(PHANTOMS, style="bold yellow", soft_wrap=True)
        dealt = plan.load_and_split()
        terminal.print_data(dealt.images, dealt.split, console)
        audit = audit_images(dealt.images, dealt.parts, settings.split)
        terminal.print_verdict(audit, settings, console)
        if settings.strict:
            refuse_leaks(audit)

        # ---- pretrained weights that reach as deep as the space, before any worker starts -------------
        weights = None if settings.weights == "none" else read_covering(settings.weights or "", plan.space.deepest)

        # ---- the cluster, and what of it the search takes ---------------------------------------------
        dashboard = connect(settings.address, settings.verbose, experiment.name)
        allotment = plan_resources(settings)
        terminal.print_plan(
            plan, f"{allotment}; the final retraining on {plan_retraining_resources(settings)}", dashboard, console
        )
        if settings.plan:
            terminal.print_space(plan.space, console)
            return
        check_storage(experiment)
        mlflow = MLflowTracker(settings.track, experiment.name, new=not settings.resume) if settings.track else None
        kept_alone.enter_context(plan.exclusive_lock())
        kept_alone.enter_context(plan.mirrored_study())
        study = open_study(plan.study_url, experiment.name, plan.space, settings.epochs, new=not settings.resume)
        study.set_user_attr("cluster", f"{allotment}, on {machines()}")
        plan.save(dealt)
        experiment.write(bundle.AUDIT, bundle.as_json(audit))
        if mlflow:
            kept_alone.enter_context(mlflow.kept_up(study, console))
        backbone = None if weights is None else ray.put(weights)
        common = has_shared_file_system(experiment)

        def material(rows: np.ndarray, file: str, epochs: int | None = None) -> SharedDataset:
            path = plan.study_folder / file if common else None
            return share_dataset(settings, dealt.images, rows, backbone, epochs, path)

        outcome = BundleFiles(plan, dealt, audit, study, allotment.slots)

        # ---- the search: its workers are given train and validation, and no test image ----------------
        slot = SlotPlan(
            experiment=experiment,
            material=material(dealt.searched, "search-images.npy"),
            folds=tuple(Fold(*fold) for fold in dealt.folds),
            workers=allotment.workers,
            resources_per_worker=allotment.resources_per_worker,
        )
        console.print(f"\nsearching, {allotment.slots} trials at a time", style="bold")
        run_search(
            study,
            plan.space,
            slot,
            trials=settings.trials,
            slots=allotment.slots,
            seed=settings.seed,
            console=console,
            callbacks=[BestSoFarCallback(study, experiment, outcome.so_far)],
        )
        trials = finished_trials(study)
        best = best_trial(trials)
        if best is None:
            reasons = [f"  trial {trial.number} {trial.user_attrs.get('ended')}" for trial in trials]
            raise NothingToRetrain("\n".join(["no trial ran to its end, so there is nothing to retrain:", *reasons]))

        # ---- how far the winner's figures are a matter of the seed ------------------------------------
        seeds, repeats = None, f"{experiment.name}-seeds"
        if settings.seeds:
            console.print(f"\ntraining trial {best.number} anew, with {settings.seeds} other seeds", style="bold")
            others = [{"number": k, "seed": (settings.seed + k) % 2**32} for k in range(1, settings.seeds + 1)]
            orders = [other | {"configuration": best.user_attrs["configuration"]} for other in others]
            seeds = over_seeds(train_again(slot, repeats, orders, settings.epochs, allotment.slots))

        # ---- retrained on train and validation, judged once on test -----------------------------------
        def retrain(trial: FrozenTrial) -> RetrainedModel:
            final = plan_retraining_resources(settings)  # nodes have come and gone
            configuration, epochs = hyperparameters_of(trial), int(best_figures(trial)["epoch"])
            console.print(f"\nretraining trial {trial.number} on train and validation, {epochs} epochs", style="bold")
            return retrain_and_predict(
                FinalPlan(
                    experiment=experiment,
                    material=material(np.arange(len(dealt.split)), "all-images.npy", epochs),
                    configuration=configuration,
                    seed=settings.seed,
                    train_indices=dealt.searched,
                    test_indices=dealt.test,
                    workers=final.workers,
                    resources_per_worker=final.resources_per_worker,
                ),
                name=f"trial_{trial.number:04d}_{epochs:03d}_epochs",
            )

        judged, published = retrain(best), None
        if settings.compare_baseline and best.number == BASELINE:
            console.print("the winner is the published configuration: there is nothing to compare it with")
        elif settings.compare_baseline:
            baseline = best_trial(trial for trial in trials if trial.number == BASELINE)
            if baseline is None:
                console.print("the published configuration did not run to its end: nothing to compare with")
            else:
                published = baseline, retrain(baseline)

        # ---- the bundle -------------------------------------------------------------------------------
        final = outcome.final(best, judged, published, seeds)
        files = outcome.files(final)
        try:
            files |= pages(experiment.name, gather_results(experiment, study, final), Pictures(dealt.images))
        except Exception as error:  # a page that cannot be drawn is no reason to lose a model
            console.print(f"the bundle is without report.html: {error!r}", style="yellow", soft_wrap=True, markup=False)
        bundle.write_bundle(experiment, files)
        with suppress(StorageError):  # what stays there is never read again
            experiment.delete_folder(bundle.SO_FAR)
            experiment.delete_folder(repeats)
        if mlflow and final.metrics.test:
            epochs = int(best_figures(best)["epoch"])
            mlflow.add_final(best.number, hyperparameters_of(best), epochs, final.metrics.test)
        terminal.print_outcome(plan, final.metrics, console)
    except (KeyboardInterrupt, NodeRefused) as stop:
        begun = experiment.exists("settings.yaml")
        raise type(stop)(f"{stop}\nTo go on: {plan.resume_command}".lstrip() if begun else str(stop)) from None
    finally:
        kept_alone.close()
        if started_here:
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())


def pages(name: str, found: SearchResults, pictures: Pictures) -> dict[str, bytes]:
    """The pages of a bundle, by file name."""
    return {REPORT: report_page(name, found, pictures), CARD: model_card(name, found)}
