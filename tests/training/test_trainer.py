"""A training learns, freezes, stops and goes on, and does the same however many workers share it."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from toys import PX, SMALL, assert_same, toy_data, training

from lungct_tune.config.hyperparameters import Hyperparameters
from lungct_tune.models.preprocessing import as_grey, forward
from lungct_tune.models.truncated_resnet import TruncatedResNet50
from lungct_tune.training.trainer import NotFiniteLoss, Trainer, schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny layers gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_learns() -> None:
    easy = training(replace(SMALL, augmentation=0.1), epochs=12)
    losses = [easy.train_epoch() for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    images_N = np.arange(40, 48)
    probabilities_NC = easy.probabilities(images_N)
    assert probabilities_NC.shape == (8, 4) and probabilities_NC.dtype == np.float32
    np.testing.assert_allclose(probabilities_NC.sum(axis=1), 1, rtol=1e-5)
    assert (probabilities_NC.argmax(axis=1) == toy_data()[1][images_N].numpy()).mean() >= 0.75


def test_stops_where_its_schedule_ends() -> None:
    short = training(epochs=1)
    short.train_epoch()
    with pytest.raises(RuntimeError, match="all 1 epochs"):
        short.train_epoch()


def test_an_interrupted_training_goes_on_as_if_it_had_not_been() -> None:
    through = training()
    losses = [through.train_epoch() for _ in range(4)]

    interrupted = training()
    interrupted.train_epoch()
    interrupted.train_epoch()
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    torch.manual_seed(99)  # whatever else runs in the process
    file.seek(0)
    resumed = training()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.epoch == 2
    assert [resumed.train_epoch() for _ in range(2)] == losses[2:]
    assert_same(resumed.model_state(), through.model_state())
    np.testing.assert_array_equal(resumed.probabilities(range(48)), through.probabilities(range(48)))


def test_the_fifth_training_in_a_process_gives_what_it_gives_as_the_first() -> None:
    first = training()
    loss = first.train_epoch()
    for depth, frozen_share, seed in ((1, 0.0, 0), (11, 0.5, 1), (8, 1.0, 2)):
        training(Hyperparameters(truncation_depth=depth, frozen_share=frozen_share), seed=seed).train_epoch()
    fifth = training()
    assert fifth.train_epoch() == loss
    assert_same(fifth.model_state(), first.model_state())
    assert training(seed=4).train_epoch() != loss


def test_frozen_layers_stay_as_they_were_and_all_others_learn() -> None:
    half = training(Hyperparameters(truncation_depth=8, frozen_share=0.5))  # one block and the stem
    before = half.model_state()
    half.train_epoch()
    after = half.model_state()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    frozen = {key for key in before if key.rpartition(".")[0] in half.model.frozen}
    assert {"backbone.bn1.running_mean", "backbone.layer1.0.downsample.1.num_batches_tracked"} <= frozen
    counts = {key for key in before if key.endswith("num_batches_tracked")}  # start anew with each estimation
    assert changed | counts == before.keys() - frozen | counts


def test_starts_from_the_weights_it_is_given() -> None:
    torch.manual_seed(8)
    state = TruncatedResNet50(5).backbone.state_dict()
    assert_same(training(backbone_state=state).model.backbone.state_dict(), state)


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    broken = training(replace(SMALL, head_lr=1e38))
    with pytest.raises(NotFiniteLoss, match=r"in epoch 1, step \d of 3"):
        broken.train_epoch()
    assert broken.epoch == 0


def test_images_may_stay_in_a_file(tmp_path: Path) -> None:
    images_NHW, _ = toy_data()
    images_NHW.numpy().tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", dtype=np.uint8, mode="r+", shape=tuple(images_NHW.shape))
    assert training(images_NHW=torch.from_numpy(mapped)).train_epoch() == training().train_epoch()


def test_probabilities_are_those_of_the_sample_for_90_images_to_1() -> None:
    """Found: with class weights, label smoothing was weighted too, and the optimum named the wrong class."""
    generator = torch.Generator().manual_seed(1)
    labels_N = torch.tensor([0] * 90 + [1])
    images_NHW = torch.randint(120, 130, (91, PX, PX), generator=generator).to(torch.uint8)  # nothing tells them apart
    rare = training(
        replace(SMALL, truncation_depth=1, dropout=0.0, augmentation=0.0, frozen_share=1.0),
        images_NHW=images_NHW,
        labels_N=labels_N,
        train_indices=range(91),
        classes=2,
        epochs=6,
        batch_size=30,
    )
    for _ in range(6):
        rare.train_epoch()
    probabilities_NC = rare.probabilities(range(91))
    assert (probabilities_NC.argmax(axis=1) == 0).all()
    # smoothing moves the optimum from 1 / 91 by a twentieth
    assert probabilities_NC[:, 1].mean() == pytest.approx(1 / 91 + 0.05, abs=0.05)


def test_backbone_and_head_have_their_rates_and_only_matrices_decay() -> None:
    whole = training(Hyperparameters(backbone_lr=1e-5, head_lr=1e-4, weight_decay=0.3))
    rate = {
        p: (group["peak_lr"], group["weight_decay"]) for group in whole.optimizer.param_groups for p in group["params"]
    }
    for name, parameter in whole.model.named_parameters():
        peak_lr = 1e-5 if name.startswith("backbone") else 1e-4
        assert rate[parameter] == (peak_lr, 0.3 if parameter.ndim > 1 else 0.0), name


def test_learning_rates_warm_up_and_fall_to_nothing() -> None:
    rates = [schedule(step / 1000) for step in range(1001)]
    assert rates[0] == 0 and max(rates) == 1 == rates[50] and rates[-1] == pytest.approx(0)
    assert rates[:51] == sorted(rates[:51]) and rates[50:] == sorted(rates[50:], reverse=True)


def test_the_model_state_is_a_copy_that_rebuilds_the_model(tmp_path: Path) -> None:
    trained = training()
    trained.train_epoch()
    state = trained.model_state()
    save_file(state, tmp_path / "model.safetensors")
    probabilities_NC = trained.probabilities([3, 1])
    trained.train_epoch()
    rebuilt = TruncatedResNet50(5, classes=4, mirrored=True).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(rebuilt.state_dict(), state)
    images_NHW, _ = toy_data()
    with torch.inference_mode():
        again_NC = forward(rebuilt, as_grey(images_NHW[[3, 1]]), "imagenet").softmax(dim=1)
    np.testing.assert_allclose(again_NC.numpy(), probabilities_NC, rtol=1e-5)


@pytest.mark.parametrize(("flip", "mirrored"), [(0.2, False), (0.25, True), (0.5, True)])
def test_predictions_are_mirrored_where_training_images_are_flipped_and_not_in_a_rough_validation(
    flip: float, mirrored: bool
) -> None:
    trained = training(replace(SMALL, flip=flip), epochs=2)
    mirror_NHW = toy_data()[0].flip(2)
    for rough, same in ((True, False), (False, mirrored)):
        trained.train_epoch()
        there, back = (trained.probabilities(range(8), images, rough=rough) for images in (None, mirror_NHW))
        assert np.allclose(there, back, atol=1e-5) == same
    assert np.array_equal(trained.probabilities(range(8), rough=True), there), "the last epoch is never rough"


@pytest.mark.parametrize("size", [{"batch_size": 1}, {"train_indices": [5]}])
def test_refuses_batches_too_small_to_normalise(size: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        training(**size)


NO_DROPOUT = replace(SMALL, dropout=0.0)
"""Dropout differs between workers."""

WORLDS = (2, 3)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What real worker processes say, in a file each for every group of them."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(work, args=(folder,), nprocs=max(WORLDS))  # one set of processes for all groups: each imports torch
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def reports(request: pytest.FixtureRequest, workers: Path) -> list[dict[str, Any]]:
    """What each of 2 or 3 real worker processes says of the same trainings."""
    return [torch.load(workers / f"{rank} of {request.param}.pt", weights_only=False) for rank in range(request.param)]


def work(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            work_in_group(rank, world, folder)


def work_in_group(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-of-{world}", rank=rank, world_size=world)
    report: dict[str, Any] = {"validation": {n: training().probabilities(range(n)) for n in (0, 2, 7)}}

    shared = training(NO_DROPOUT)
    shared.precision = torch.float32  # bfloat16 rounds other shares of a batch otherwise
    report["loss"], report["probabilities"] = shared.train_epoch(), shared.probabilities(range(48))

    lower = training(NO_DROPOUT)
    lower.precision = torch.bfloat16
    report["loss in bfloat16"], report["dtypes"] = epoch_and_dtypes(lower)

    usual = training()
    usual.train_epoch()
    report["model"], report["state"] = usual.model_state(), usual.state_dict()
    for name, changes in {
        "diverged": {"configuration": replace(SMALL, head_lr=1e38)},
        "odd": {"batch_size": 13},
    }.items():
        try:
            training(**changes).train_epoch()
        except (NotFiniteLoss, ValueError) as error:
            report[name] = f"{type(error).__name__}: {error}"
    torch.save(report, folder / f"{rank} of {world}.pt")
    dist.destroy_process_group()


def epoch_and_dtypes(trainer: Trainer) -> tuple[float, set[tuple[str, torch.dtype]]]:
    """The loss of an epoch, and what some parts of the network compute in."""
    seen: set[tuple[str, torch.dtype]] = set()
    for name in ("backbone.conv1", "backbone.bn1", "head.dense1", "head.logits"):
        trainer.model.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: seen.add((name, out.dtype))
        )
    return trainer.train_epoch(), seen


def test_validation_is_complete_and_in_order_for_any_number_of_workers(reports: list[dict[str, Any]]) -> None:
    alone = training()
    for n in (0, 2, 7):  # fewer images than workers, and more than they can share evenly
        for report in reports:
            assert report["validation"][n].shape == (n, 4)
            np.testing.assert_allclose(report["validation"][n], alone.probabilities(range(n)), rtol=1e-4)


def test_workers_that_share_batches_learn_what_one_learns(reports: list[dict[str, Any]]) -> None:
    alone = training(NO_DROPOUT)
    alone.precision = torch.float32
    loss = alone.train_epoch()
    for report in reports:
        assert report["loss"] == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(report["probabilities"], alone.probabilities(range(48)), atol=1e-4)


def test_only_the_backbone_of_a_group_computes_in_bfloat16(reports: list[dict[str, Any]]) -> None:
    """Found: the head, the logits and the loss did too, since the shared batch norm gave float32."""
    alone = training(NO_DROPOUT)
    alone.precision = torch.bfloat16
    loss, dtypes = epoch_and_dtypes(alone)
    backbone, head = {("backbone.conv1", torch.bfloat16), ("backbone.bn1", torch.bfloat16)}, torch.float32
    assert dtypes == backbone | {("head.dense1", head), ("head.logits", head)}
    for report in reports:
        assert report["dtypes"] == dtypes
        assert report["loss in bfloat16"] == pytest.approx(loss, rel=2e-3)


def test_workers_end_an_epoch_with_the_same_model(reports: list[dict[str, Any]]) -> None:
    for report in reports[1:]:
        assert_same(report["model"], reports[0]["model"])


def test_a_state_of_many_workers_goes_on_with_one(reports: list[dict[str, Any]]) -> None:
    alone = training()
    alone.load_state_dict(reports[0]["state"])
    assert alone.epoch == 1
    torch.testing.assert_close(alone.model_state(), reports[0]["model"])  # one more thread adds in another order
    assert alone.train_epoch() > 0


def test_workers_fail_together_and_for_the_same_reason(reports: list[dict[str, Any]]) -> None:
    assert {report["diverged"] for report in reports} == {reports[0]["diverged"]}
    assert reports[0]["diverged"].startswith("NotFiniteLoss: loss")
    assert all(report["odd"].startswith("ValueError: batch size 13 cannot be shared") for report in reports)
