"""The study as the memory of a search: real Optuna on its journal, driven as Ray Tune drives it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from driven_searcher import EPOCHS, SPACE, RayTrial, Tune, epoch_report
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from lungct_tune.config.hyperparameters import PUBLISHED
from lungct_tune.config.search_space import parse_space
from lungct_tune.errors import SearchStopped
from lungct_tune.experiment.folder import Experiment
from lungct_tune.experiment.study import (
    StudyError,
    finished_trials,
    open_study,
    read_history,
    read_trials,
    rungs,
    search_cost,
)
from lungct_tune.experiment.trial import BASELINE, KEPT_TRIALS, EpochReport, Outcome, TrialRecord, best_trial
from lungct_tune.tuning.searcher import MAX_FAILED_IN_A_ROW, OptunaScheduler
from lungct_tune.tuning.slots import REPORT

if TYPE_CHECKING:
    from pathlib import Path


def test_the_published_configuration_runs_first_even_outside_the_space(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    first = tune.run()
    assert first["configuration"] == PUBLISHED.as_dict() and first["number"] == 0
    with np.errstate(all="raise"):
        others = [tune.run() for _ in range(15)]  # more than TPE's random start
    depths = {other["configuration"]["truncation_depth"] for other in others}
    assert min(depths) >= 30 and len(depths) > 3
    assert {other["configuration"]["weight_decay"] for other in others} == {0.5}
    assert tune.study.trials[0].state == TrialState.COMPLETE


def test_stopped_trials_are_pruned_with_all_their_epochs(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    for _ in range(10):
        tune.run()
    pruned = [trial for trial in tune.study.trials if trial.state == TrialState.PRUNED]
    assert pruned and all(len(trial.intermediate_values) in rungs(EPOCHS) for trial in pruned)
    for trial in pruned:
        assert trial.user_attrs["ended"] == f"stopped early after epoch {len(trial.intermediate_values)}"
    complete = [trial for trial in tune.study.trials if trial.state == TrialState.COMPLETE]
    assert all(len(trial.intermediate_values) == EPOCHS for trial in complete)


def test_interrupted_or_not_the_suggestions_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = Tune(tmp_path / "whole")
    expected = [whole.run() for _ in range(14)]
    got: list[dict[str, Any]] = []
    while len(got) < 14:
        tune = Tune(tmp_path / "broken")
        got += [tune.run() for _ in range(min(4, 14 - len(got)))]
    assert [s["configuration"] for s in got] == [s["configuration"] for s in expected]


def test_a_trial_that_was_running_goes_on_and_earlier_epochs_are_filled_in(tmp_path: Path) -> None:
    first = Tune(tmp_path).run(epochs=2)
    tune = Tune(tmp_path)
    again = tune.suggest("ray-new")
    assert again == first
    # the workers kept epoch 3, and the driver died before it told the study
    tune.search.record("ray-new", epoch_report(first["configuration"], 1, 2, 3, 4))
    assert sorted(tune.study.trials[0].intermediate_values) == [1, 2, 3, 4]
    assert [figures.epoch for figures in read_trials(tune.study)[0].history] == [1, 2, 3, 4]


def test_fixed_trials_are_queued_once_however_often_the_study_is_opened(tmp_path: Path) -> None:
    text = f"{SPACE}\nfixed_trials: [{{truncation_depth: 49}}]"
    for _ in range(3):
        tune = Tune(tmp_path, text)
    assert len(tune.study.trials) == 2
    tune.run()
    assert Tune(tmp_path, text).run()["configuration"]["truncation_depth"] == 49


def test_a_fixed_trial_that_differs_only_in_what_is_not_varied_is_run_too(tmp_path: Path) -> None:
    tune = Tune(tmp_path, f"{SPACE}\nfixed_trials: [{{head_lr: 1e-5}}]")
    assert [tune.run()["configuration"]["head_lr"] for _ in range(2)] == [PUBLISHED.head_lr, 1e-5]


def test_the_published_trial_is_not_stopped_even_if_a_better_one_was_there_first(tmp_path: Path) -> None:
    tune = Tune(tmp_path, f"{SPACE}\nfixed_trials: [{{truncation_depth: 40}}, {{truncation_depth: 1}}]")
    rung = rungs(EPOCHS)[0]
    trials = {name: tune.suggest(name)["configuration"] for name in ("published", "better", "worse")}
    for name in ("better", "published", "worse"):
        tune.search.record(name, epoch_report(trials[name], *range(1, rung + 1)))
    stopped = {name: tune.search.should_stop(name) for name in ("better", "published", "worse")}
    assert stopped == {"better": False, "published": False, "worse": True}


def test_the_published_trial_is_never_stopped_but_others_are_measured_against_it(tmp_path: Path) -> None:
    tune = Tune(tmp_path, f"{SPACE}\nfixed_trials: [{{truncation_depth: 1}}]")
    tune.run()
    tune.run()
    baseline, worse = tune.study.trials
    assert baseline.state == TrialState.COMPLETE and worse.state == TrialState.PRUNED


def test_a_trial_whose_asking_was_cut_short_gets_all_its_parameters(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    tune.run()
    tune.study.ask({"dropout": tune.space.distributions["dropout"]})  # killed before the second parameter
    resumed = Tune(tmp_path)
    suggested = resumed.suggest("ray-new")
    assert set(resumed.study.trials[1].params) == set(resumed.space.distributions)
    assert suggested["configuration"]["truncation_depth"] >= 30


def test_a_trial_that_was_to_be_stopped_when_the_driver_died_is_stopped(tmp_path: Path) -> None:
    tune = Tune(tmp_path, f"{SPACE}\nfixed_trials: [{{truncation_depth: 1}}]")
    tune.run()
    suggested = tune.suggest("a")
    tune.search.record("a", epoch_report(suggested["configuration"], 1, 2, 3))
    assert tune.search.should_stop("a")
    resumed = Tune(tmp_path, f"{SPACE}\nfixed_trials: [{{truncation_depth: 1}}]")
    assert resumed.study.trials[1].state == TrialState.PRUNED
    assert resumed.run()["number"] == 2


def test_a_study_is_neither_taken_over_nor_begun_twice(tmp_path: Path) -> None:
    space = parse_space(SPACE, "test")
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(StudyError, match="there is no study 'one' in sqlite"):
        open_study(url, "one", space, EPOCHS, new=False)
    open_study(url, "one", space, EPOCHS, new=True)
    with pytest.raises(StudyError, match=r"already, though .* Choose another --name"):
        open_study(url, "one", space, EPOCHS, new=True)
    with pytest.raises(StudyError, match="cannot be opened"):
        open_study("redis://127.0.0.1:9", "one", space, EPOCHS, new=True)
    with pytest.raises(StudyError, match="cannot be opened"):
        open_study("postgresql://me:secret@127.0.0.1:9/optuna", "one", space, EPOCHS, new=True)


def test_divergence_is_a_bad_score_and_failure_has_its_reason(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    tune.run()
    for name in ("a", "b", "c"):
        tune.suggest(name)
    tune.search.record("a", epoch_report(PUBLISHED.as_dict(), 1))
    tune.search.on_trial_complete("a", {REPORT: EpochReport(Outcome.DIVERGED, reason="loss nan in epoch 2")})
    tune.search.note_failure("b", "out of memory")
    tune.search.on_trial_complete("b", error=True)
    tune.search.on_trial_complete("c", {REPORT: EpochReport(Outcome.FAILED, reason="the workers ended")})
    tune.search.tell_failed()
    _, diverged, failed, lost = tune.study.trials
    assert (diverged.state, diverged.value) == (TrialState.COMPLETE, 0.0)
    assert diverged.user_attrs["ended"] == "diverged: loss nan in epoch 2"
    assert (failed.state, failed.user_attrs["ended"]) == (TrialState.FAIL, "failed: out of memory")
    assert (lost.state, lost.user_attrs["ended"]) == (TrialState.FAIL, "failed: the workers ended")
    trials = finished_trials(tune.study)
    best = best_trial(trials)
    assert best is not None and best.number == 0
    assert [trial.outcome for trial in trials] == [
        Outcome.COMPLETED,
        Outcome.DIVERGED,
        Outcome.FAILED,
        Outcome.FAILED,
    ]
    assert [len(trial.history) for trial in trials] == [EPOCHS, 1, 0, 0]
    assert trials[2].last is None
    rows = [trial.row() for trial in trials]
    assert [row["state"] for row in rows] == [trial.state.name for trial in tune.study.trials]
    assert [row["ended"] for row in rows] == [trial.user_attrs["ended"] for trial in tune.study.trials]
    cost = search_cost(tune.study, trials, slots=2)
    assert cost.training_s == pytest.approx(2.5 * 10) and cost.ended == {"completed": 1, "diverged": 1, "failed": 2}


def test_a_slot_lost_on_the_way_leaves_no_mark_on_a_trial_that_recovers(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    suggested = tune.suggest("a")
    OptunaScheduler(tune.search).on_trial_error(None, RayTrial("a"))
    last = replace(epoch_report(suggested["configuration"], 1), outcome=Outcome.COMPLETED)
    tune.search.on_trial_complete("a", {REPORT: last})
    assert tune.study.trials[0].state == TrialState.COMPLETE
    assert tune.study.trials[0].user_attrs["ended"] == "completed"


def test_a_trial_that_has_not_ended_stays_one_that_can_be_resumed(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    suggested = tune.suggest("a")
    report = epoch_report(suggested["configuration"], 1)
    tune.search.record("a", report)
    tune.search.on_trial_complete("a", {REPORT: report})
    assert tune.study.trials[0].state == TrialState.RUNNING and "ended" not in tune.study.trials[0].user_attrs
    assert Tune(tmp_path).suggest("b") == suggested


def test_what_only_a_running_trial_needs_is_deleted_at_its_end(tmp_path: Path) -> None:
    experiment = Experiment.at(str(tmp_path), "test")
    for name in ("last.pt", "state-0002.pt", "state-0002-1.pt", "model.safetensors"):
        experiment.write(f"trials/0000/{name}", b"")
    tune = Tune(tmp_path)
    tune.run()
    tune.threads.shutdown()
    assert set(experiment.files("trials/0000")) == {"trials/0000/model.safetensors"}


def test_states_that_a_driver_left_when_it_died_are_deleted_by_the_next(tmp_path: Path) -> None:
    experiment, tune = Experiment.at(str(tmp_path), "test"), Tune(tmp_path)
    tune.run()
    tune.run(epochs=2)  # still runs
    tune.threads.shutdown()
    for name in ("0000/state-0004.pt", "0000/model.safetensors", "0001/state-0002.pt"):
        experiment.write(f"trials/{name}", b"")
    Tune(tmp_path).threads.shutdown()
    assert set(experiment.files("trials")) == {"trials/0000/model.safetensors", "trials/0001/state-0002.pt"}


def test_only_the_best_trials_keep_their_weights(tmp_path: Path) -> None:
    experiment = Experiment.at(str(tmp_path), "test")
    tune = Tune(tmp_path)
    orders, scores = [], {}
    for score in (0, *np.random.default_rng(0).permutation(KEPT_TRIALS + 6) + 1):  # the published one is the worst
        order = tune.search.suggest(f"ray-{score}")["order"]
        report = replace(epoch_report(order.hyperparameters.as_dict(), 1), outcome=Outcome.COMPLETED)
        figures = replace(report.epochs[0], balanced_accuracy=float(score))
        experiment.write(f"trials/{order.number:04d}/model.safetensors", b"")
        orders.append(order)
        scores[order.number] = float(score)
        tune.search.on_trial_complete(f"ray-{score}", {REPORT: replace(report, epochs=(figures,))})
    tune.threads.shutdown()
    kept = {int(path.split("/")[1]) for path in experiment.files("trials")}
    assert kept == {number for number, score in scores.items() if score >= 7} | {BASELINE}
    assert [order.weights_from for order in orders[: KEPT_TRIALS + 2]] == [None] * (KEPT_TRIALS + 1) + [
        (min(scores[order.number] for order in orders[1 : KEPT_TRIALS + 1]), -1.0)
    ]
    resumed = Tune(tmp_path)
    assert resumed.suggest("again")["weights_from"] == (7.0, -1.0)


def test_epochs_that_were_repeated_replace_the_earlier_ones_and_what_followed(tmp_path: Path) -> None:
    """A crash lost the state after epoch 1; the study knows three epochs of it."""
    configuration = Tune(tmp_path).run(epochs=3)["configuration"]
    tune = Tune(tmp_path)
    tune.suggest("again")
    first, second = (epoch_report(configuration, epoch).epochs[0] for epoch in (1, 2))
    second = replace(second, balanced_accuracy=0.125, at=1.9e9)
    tune.search.record("again", EpochReport(Outcome.RUNNING, (replace(first, slot=None), second)))
    trial = tune.study.trials[0]
    assert [(figures.epoch, figures.at) for figures in read_history(trial.user_attrs)[0]] == [(1, first.at), (2, 1.9e9)]
    assert trial.intermediate_values[2] == 0.125
    assert read_history(Tune(tmp_path).study.trials[0].user_attrs) == read_history(trial.user_attrs)


def test_several_epochs_of_a_step_are_one_attribute_and_all_intermediate_values(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    configuration = tune.suggest("a")["configuration"]
    tune.search.record("a", epoch_report(configuration, 1, 2, 3))
    tune.search.record("a", epoch_report(configuration, 4, 5))
    trial = tune.study.trials[0]
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4, 5]
    assert [len(trial.user_attrs[key]) for key in ("history", "history:1")] == [3, 2]


def test_a_trial_is_stopped_only_at_a_rung(tmp_path: Path) -> None:
    tune = Tune(tmp_path, f"{SPACE}\nfixed_trials: [{{truncation_depth: 1}}]")
    tune.run()
    configuration = tune.suggest("worse")["configuration"]
    assert rungs(EPOCHS) == (3,)
    stopped = []
    for epoch in (2, 3):
        tune.search.record("worse", epoch_report(configuration, epoch))
        stopped.append(tune.search.should_stop("worse"))
    assert stopped == [False, True]


@pytest.fixture(autouse=True)
def _no_warnings_about_ranges(recwarn: pytest.WarningsRecorder) -> Any:
    yield
    assert not [w for w in recwarn if "out of range" in str(w.message) or "xperimental" in str(w.message)]


@given(st.integers(1, 200))
def test_no_rung_is_in_the_last_third_of_the_epochs(epochs: int) -> None:
    steps = rungs(epochs)
    assert 9 * steps[0] >= epochs and all(b == 3 * a for a, b in pairwise(steps))
    assert all(3 * rung <= 2 * epochs for rung in steps) or epochs == 1
    assert len(steps) == 1 or steps[0] >= 3, "after one or two epochs all trials are near chance"


def fail(tune: Tune) -> int:
    """A trial whose slot loses its workers again and again; its number."""
    suggested = tune.suggest("failing")
    report = EpochReport(Outcome.FAILED, reason="the workers ended")
    tune.search.on_trial_complete("failing", {REPORT: report})
    return int(suggested["number"])


def test_a_trial_that_fails_alone_is_told_once_another_has_ended_well(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    tune.run()
    number = fail(tune)
    assert tune.study.trials[number].state == TrialState.RUNNING
    tune.run()
    failed = tune.study.trials[number]
    assert failed.state == TrialState.FAIL and failed.user_attrs["ended"] == "failed: the workers ended"


def test_trials_that_fail_one_after_the_other_end_the_search_and_are_trained_again(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    tune.run()
    numbers = [fail(tune) for _ in range(MAX_FAILED_IN_A_ROW - 1)]
    with pytest.raises(SearchStopped, match=r"5 trials in a row .* The last one: the workers ended"):
        fail(tune)
    resumed = Tune(tmp_path)
    assert [resumed.run()["number"] for _ in range(MAX_FAILED_IN_A_ROW)] == [*numbers, numbers[-1] + 1]
    assert not [trial for trial in resumed.study.trials if trial.state == TrialState.FAIL]


def test_the_driver_may_die_after_any_line_of_the_journal(tmp_path: Path) -> None:
    """While a trial is made, between two epochs, between the outcome and `tell`: as many trials as asked, none twice.

    They are the same trials, with two exceptions. A trial of which some parameters were drawn may get other values for
    the rest. A trial that was to be stopped at a rung may go on to the next one, if its outcome was not noted yet.
    """
    journal = tmp_path / "study.journal"
    whole = Tune(tmp_path)
    whole._open[journal].sync()
    begin = len(journal.read_bytes().splitlines())
    trials = len([whole.run() for _ in range(8)])
    whole._open[journal].sync()
    lines = journal.read_bytes().splitlines(keepends=True)
    expected = [without_times(trial) for trial in finished_trials(whole.study)]
    assert {trial.outcome for trial in expected} == {Outcome.COMPLETED, Outcome.STOPPED}
    kinds = [json.loads(line)["op_code"] for line in lines]
    for count in range(begin, len(lines)):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:count]))
        resumed = Tune(folder)
        while resumed.search.tally.finished < trials:
            resumed.run()
        ended = [without_times(trial) for trial in read_trials(resumed.study)]
        assert [trial.number for trial in ended] == list(range(trials))
        assert all([figures.epoch for figures in t.history] in ([1], [1, 2, 3], [*range(1, 10)]) for t in ended)
        between_draws = {*kinds[count - 1 : count + 1]} == {JournalOperation.SET_TRIAL_PARAM}
        before_outcome = b'{"completed_rung' in lines[count - 1] or b'{"ended"' in lines[count - 1]
        assert ended == expected or between_draws or before_outcome, lines[count - 1]
        resumed._open[folder / "study.journal"].close()


def without_times(trial: TrialRecord) -> TrialRecord:
    return replace(trial, started=None, completed=None)
