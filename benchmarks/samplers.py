"""Which sampler finds the better configuration, and whether early stopping pays in a small search.

    python benchmarks/samplers.py --data DIR --weights FILE --results FILE.jsonl [--configurations 120]

Searches on real trainings cannot be repeated often enough to tell samplers apart. So this compares them on a surrogate
of them (Eggensperger et al., AAAI 2015). First, random configurations of search_spaces/shallow.yaml are trained with
the program's own trainer, and their balanced accuracy on the fold that they were not trained on is noted after each
epoch. They are kept in the results file, so an interrupted run goes on. Then a random forest learns these curves. A
trial of the compared searches has the curve that the forest predicts, plus the out-of-bag error of a random
configuration. The result of a search is what the forest predicts for the trial that it chose, without that error.

All searches have the same number of epochs to spend. With early stopping they run more trials for it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.samplers import BaseSampler, GPSampler, RandomSampler
from scipy.stats import sem, t
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor

from lungct_tune.config.search_space import SearchSpace, parse_space, read_space
from lungct_tune.data.dataset import ImageSet, read_images
from lungct_tune.data.split import fold_images
from lungct_tune.experiment.study import REDUCTION, rungs
from lungct_tune.models.pretrained import read_weights
from lungct_tune.training.objective import OBJECTIVE, validation_figures
from lungct_tune.training.trainer import Trainer
from lungct_tune.tuning.sampler import SearchSampler, startup_trials

SPACE = Path("search_spaces/shallow.yaml")
FOLDS = 4


def measure(asked: argparse.Namespace, space: SearchSpace, processes: ProcessPoolExecutor) -> None:
    """Trains random configurations, until the results file has as many as asked."""
    known = len(asked.results.read_text().splitlines()) if asked.results.exists() else 0
    images, state = read_images(asked.data, asked.size), read_weights(asked.weights)
    fold_N = fold_images(images, np.arange(len(images.table)), FOLDS, 0)
    train = partial(train_one, images, fold_N, state, space, asked.epochs, asked.device)
    with asked.results.open("a") as out:
        for line in processes.map(train, range(known, asked.configurations)):
            out.write(json.dumps(line) + "\n")
            out.flush()


def train_one(
    images: ImageSet,
    fold_N: np.ndarray,
    state: dict[str, Tensor],
    space: SearchSpace,
    epochs: int,
    device: str,
    number: int,
) -> dict[str, Any]:
    """Trains the random configuration of this number; returns it and its balanced accuracy after each epoch."""
    parameters = optuna.create_study(sampler=RandomSampler(seed=number)).ask(space.distributions).params
    labels_N = torch.tensor(images.table["label"].to_numpy())
    held = np.flatnonzero(fold_N == number % FOLDS)
    trainer = Trainer(
        space.hyperparameters(parameters),
        images_NHW=torch.from_numpy(images.images_NHW.copy()).to(device),
        labels_N=labels_N,
        train_indices=np.flatnonzero(fold_N != number % FOLDS),
        classes=len(images.classes),
        epochs=epochs,
        batch_size=32,
        seed=number,
        normalisation="unit",
        backbone_state=state,
        device=device,
    )
    curve = []
    for _ in range(epochs):
        trainer.train_epoch()
        curve.append(validation_figures(labels_N[held].numpy(), trainer.probabilities(held))[OBJECTIVE])
    return {"parameters": parameters, "curve": curve}


class Surrogate:
    """Predicts the curve of a configuration: balanced accuracy after each epoch, (E,)."""

    def __init__(self, results: Path, space: SearchSpace) -> None:
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        self._names = [name for name, of in space.distributions.items() if not of.single()]
        curves_KE = np.array([line["curve"] for line in lines])
        self.epochs = curves_KE.shape[1]
        self._forest = RandomForestRegressor(500, min_samples_leaf=3, oob_score=True, random_state=0)
        self._forest.fit([self._row(line["parameters"]) for line in lines], curves_KE)
        self._errors_KE = curves_KE - self._forest.oob_prediction_
        last_K, error_K = curves_KE[:, -1], self._errors_KE[:, -1]
        print(
            f"{len(lines)} configurations, after {self.epochs} epochs {last_K.min():.3f} to {last_K.max():.3f}; the "
            f"forest explains {1 - error_K.var() / last_K.var():.2f} of the variance, out of bag"
        )

    def curve(self, parameters: dict[str, float]) -> np.ndarray:
        return np.asarray(self._forest.predict([self._row(parameters)])[0])

    def error(self, generator: np.random.Generator) -> np.ndarray:
        """The error of a random configuration."""
        return np.asarray(generator.choice(self._errors_KE))

    def _row(self, parameters: dict[str, float]) -> list[float]:
        return [float(np.log(parameters[name]) if name.endswith("_lr") else parameters[name]) for name in self._names]


def search(surrogate: Surrogate, space: SearchSpace, name: str, asha: bool, trials: int, seed: int) -> float:
    """Runs one search with the epochs of so many trials; returns what the forest predicts for the trial it chose."""
    sampler, epochs = sampler_of(name, space, seed, trials), trials * surrogate.epochs
    stops = rungs(surrogate.epochs) if asha else ()
    pruner = optuna.pruners.SuccessiveHalvingPruner(rungs(surrogate.epochs)[0], REDUCTION)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    generator = np.random.default_rng(seed)
    while epochs > 0:
        trial = study.ask(space.distributions)
        curve = surrogate.curve(trial.params) + surrogate.error(generator)
        for epoch, value in enumerate(curve, start=1):
            trial.report(value, epoch)
            epochs -= 1
            if epoch in stops and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, curve[-1])
    return float(surrogate.curve(study.best_params)[-1])


def sampler_of(name: str, space: SearchSpace, seed: int, trials: int) -> BaseSampler:
    if name == "random":
        return RandomSampler(seed=seed)
    if name == "GP":
        return GPSampler(seed=seed, n_startup_trials=startup_trials(trials))
    return SearchSampler(space.distributions, (), seed=seed, startup=startup_trials(trials))


def quiet() -> None:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True, help="they must cover the depths of search_spaces/shallow.yaml")
    parser.add_argument("--results", type=Path, required=True, help="a file of JSON lines; it is continued")
    parser.add_argument("--configurations", type=int, default=120)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="that train or search at the same time")
    parser.add_argument("--trials", type=int, nargs="*", default=[8, 16, 40], help="of all epochs, for the same cost")
    parser.add_argument("--repeats", type=int, default=40)
    asked = parser.parse_args()
    quiet()
    space = parse_space(read_space(SPACE), str(SPACE))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(asked.processes, context, quiet) as processes:
        measure(asked, space, processes)
        surrogate = Surrogate(asked.results, space)
        print("\n| trials | sampler | early stopping | result | minus random, 95 % |\n|---|---|---|---|---|")
        for trials in asked.trials:
            random_R = np.empty(0)
            for name, asha in product(("random", "TPE, as in the program", "GP"), (False, True)):
                run = partial(search, surrogate, space, name, asha, trials)
                found_R, against = np.array(list(processes.map(run, range(asked.repeats)))), ""
                if (name, asha) == ("random", False):
                    random_R = found_R
                else:
                    better_R = found_R - random_R
                    low, high = t.interval(0.95, len(better_R) - 1, better_R.mean(), sem(better_R))
                    against = f"{better_R.mean():+.3f} ({low:+.3f} to {high:+.3f})"
                stopping = "ASHA" if asha else "none"
                print(f"| {trials} | {name} | {stopping} | {found_R.mean():.3f} | {against} |", flush=True)


if __name__ == "__main__":
    main()
