"""The main job: searches on images, retrains the best configuration, evaluates it once, and writes a bundle.

python -m lungct_tune.search --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from lungct_tune.cli import exit_status, terminal
from lungct_tune.config.settings import Settings, read_settings
from lungct_tune.display import Display, print_prose

if TYPE_CHECKING:  # imported only after the settings are checked, so that --help and errors in them answer at once
    from concurrent.futures import Future

    from lungct_tune.auditing.findings import Audit
    from lungct_tune.data.split import DataSplit
    from lungct_tune.experiment.plan import Plan
    from lungct_tune.tuning.outlook import Outlook


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    return exit_status(lambda: search(*read_settings(argv), terminal()))


def search(settings: Settings, given: set[str], console: Console) -> None:
    """Runs the whole job, from the images to the bundle.

    Args:
        settings: the user's settings; with `resume`, only the settings to change.
        given: the names of the fields that the user set.

    Raises:
        UserError: a subclass from one of the packages, with a message for the user.
        KeyboardInterrupt: Ctrl-C, with a message that says how to continue.
    """
    with Display(console) as display:
        with display.step("starting"):
            from lungct_tune.experiment.plan import plan_search

            plan = plan_search(settings, given)  # first, since an error in it is to be said at once
            # imported here and not by two threads at once: packages that import each other in a circle can fail then
            import lungct_tune.auditing.audit
            import lungct_tune.reporting.console
            from lungct_tune.tuning.callbacks.mlflow import MLflowTracker
            from lungct_tune.tuning.cluster import joined_meanwhile, starts_here

            settings = plan.settings
            tracker = MLflowTracker(settings.track, plan.experiment.name, new=plan.is_new) if settings.track else None
        with plan.resumable():
            if settings.plan and starts_here(settings.address):
                plan, split, _ = load_and_audit(plan, display)
                plan.read_weights()
                announce(plan, split, "", display)
                return
            with joined_meanwhile(settings.address, settings.verbose, plan.experiment.name, display) as dashboard:
                plan, split, audit = load_and_audit(plan, display, dashboard)
                weights = plan.read_weights()
                outlook = announce(plan, split, dashboard.result(), display)
                if settings.plan:
                    return
                from lungct_tune.search_run import start_search  # imports much that a plan does not need

                with start_search(plan, split, audit, outlook, weights, tracker, display) as run:
                    if settings.hold_test:
                        lungct_tune.reporting.console.print_held(plan, run.search(), console)
                        return
                    with run.final_slots() as slots:
                        winner = run.search()
                        retrained, published = run.retrain(winner, slots)
                        seeds = run.repeat_with_seeds(winner, slots)
                        run.write_bundle(winner, retrained, published, seeds)


def load_and_audit(plan: Plan, display: Display, joining: Future[str] | None = None) -> tuple[Plan, DataSplit, Audit]:
    """Reads, groups, splits and audits the images; the plan that it returns has the number of folds.

    Raises:
        ClusterError: the number depends on the cluster that is joined, see `workers_have_gpus`.
        DataError: they cannot be used, or the settings are strict and the split leaks.
        PlanError: they are not the images that the search started with.
    """
    from lungct_tune.auditing.audit import audit_images, refuse_leaks
    from lungct_tune.data.phantoms import PHANTOMS
    from lungct_tune.experiment.folds import decide_folds
    from lungct_tune.reporting.console import print_data, print_verdict
    from lungct_tune.tuning.cluster import workers_have_gpus

    settings, console = plan.settings, display.console
    if settings.data is None:
        print_prose(console, PHANTOMS, "bold yellow")
    with display.step("reading the images"):
        plan, split = decide_folds(plan, plan.load_and_split(), lambda: workers_have_gpus(settings, joining))
    print_data(split.images, split.split, console)
    with display.step("comparing the images"):
        audit = audit_images(split.images, split.parts, "file" if settings.split_file else settings.split)
    print_verdict(audit, settings, console)
    if settings.strict:
        refuse_leaks(audit)
    return plan, split, audit


def announce(plan: Plan, split: DataSplit, dashboard: str, display: Display) -> Outlook:
    """Prints the plan of the search, its share of the cluster and what it will take; returns the last two.

    Raises:
        ClusterError: the cluster is too small.
        PricesError: clusters/prices.yaml cannot be used.
    """
    from lungct_tune.experiment.folds import folds_line
    from lungct_tune.reporting.console import print_plan, print_space
    from lungct_tune.tuning.outlook import look_ahead

    with display.step("measuring the pace"):
        outlook = look_ahead(plan, split)
        folds = {"folds": line} if (line := folds_line(plan, split, outlook.forecast)) else {}
    print_plan(plan, outlook.resources.slots, outlook.lines | folds, dashboard, display.console)
    if plan.settings.plan:
        print_space(plan.space, display.console)
    return outlook


if __name__ == "__main__":
    sys.exit(main())
