"""A training on a GPU: in each precision, from images that fit and that do not, and against the CPU."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from devices import device, gpu  # noqa: F401
from toys import SMALL, compute_in, toy_data, training

from lungct_tune.models.preprocessing import as_grey, forward, precision_for
from lungct_tune.training.batches import gathered_ahead

if TYPE_CHECKING:
    from lungct_tune.training.trainer import Trainer

SURE = replace(SMALL, dropout=0.0)
"""Without dropout, whose random numbers differ between CPUs and GPUs; augmentation is drawn on the CPU for both."""

CLOSE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
"""How far the losses of two epochs may be from float32 on the CPU, as a share of them."""


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each precision, whatever the device's own is."""
    compute_in(request.param, monkeypatch)
    return request.param


def at(device: torch.device, **changes: object) -> Trainer:
    """The toy training, with its images on the device."""
    images_NHW, _ = toy_data()
    return training(SURE, device=device, images_NHW=images_NHW.to(device), **changes)


def test_the_precision_is_that_of_the_gpu(gpu: torch.device) -> None:
    has_bfloat16 = torch.cuda.get_device_capability(gpu) >= (8, 0)
    assert precision_for(gpu) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    assert at(gpu).scaler.is_enabled() != has_bfloat16


def test_each_precision_gives_what_float32_gives_on_a_cpu(device: torch.device, precision: torch.dtype) -> None:
    here = at(device)
    assert here.scaler.is_enabled() == (precision == torch.float16)
    losses = [here.train_epoch() for _ in range(2)]
    probabilities_NC = here.probabilities(range(40, 48))
    with pytest.MonkeyPatch.context() as exact:
        compute_in(torch.float32, exact)
        reference = at(torch.device("cpu"))
        expected = [reference.train_epoch() for _ in range(2)]
    assert losses == pytest.approx(expected, rel=CLOSE[precision])
    assert np.isfinite(probabilities_NC).all() and probabilities_NC.dtype == np.float32


def test_predictions_of_one_model_are_the_same_but_for_rounding(device: torch.device, precision: torch.dtype) -> None:
    trained = at(device)
    trained.train_epoch()
    probabilities_NC = trained.probabilities(range(48))
    on_cpu = at(torch.device("cpu"))
    on_cpu.average.model.load_state_dict(trained.model_state())
    with pytest.MonkeyPatch.context() as exact:
        compute_in(torch.float32, exact)
        expected_NC = on_cpu.probabilities(range(48))
    np.testing.assert_allclose(probabilities_NC, expected_NC, atol=0.02)


def test_logits_of_an_image_are_not_equal(device: torch.device, precision: torch.dtype) -> None:
    model = at(device).model.eval()
    images_NHW, _ = toy_data(400)
    with torch.inference_mode():
        logits_NC = forward(model, as_grey(images_NHW.to(device)), "unit")
    assert logits_NC.dtype == torch.float32
    assert all(len(logits_C.unique()) == 4 for logits_C in logits_NC.cpu())


def test_images_and_weights_are_channels_last(device: torch.device) -> None:
    trained, seen = at(device), []
    convolutions = [m for m in trained.model.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trained.train_epoch()
    last = torch.channels_last
    assert all(convolution.weight.is_contiguous(memory_format=last) for convolution in convolutions)
    assert len(seen) == len(convolutions) * trained.steps
    assert all(images_NCHW.is_contiguous(memory_format=last) for images_NCHW in seen)


def test_cudnn_chooses_by_speed(gpu: torch.device) -> None:
    at(gpu)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic


def test_images_that_do_not_fit_are_copied_from_pinned_memory(gpu: torch.device) -> None:
    images_NHW, _ = toy_data()
    assert next(gathered_ahead(images_NHW, [torch.arange(4)], pinned=True)).is_pinned()
    from_cpu, from_gpu = training(SURE, device=gpu), at(gpu)
    assert from_cpu.images_NHW.device.type == "cpu" and from_gpu.images_NHW.device.type == "cuda"
    assert from_cpu.train_epoch() == pytest.approx(from_gpu.train_epoch(), rel=1e-2)
    from_gpu.average.model.load_state_dict(from_cpu.model_state())
    np.testing.assert_allclose(from_cpu.probabilities(range(48)), from_gpu.probabilities(range(48)), atol=1e-2)


def test_pinned_memory_is_not_written_to_again_before_it_is_copied(gpu: torch.device) -> None:
    """Many large copies in a row, while the GPU has much to do, so that the copies wait."""
    images_NHW = torch.arange(64, dtype=torch.uint8)[:, None, None].expand(64, 512, 512).contiguous()
    batches = [torch.full((16,), number % 64) for number in range(100)]
    busy = torch.randn(4096, 4096, device=gpu)
    sums = []
    for images_nHW in gathered_ahead(images_NHW, batches, pinned=True):
        busy = busy @ busy / 4096
        sums.append(images_nHW.to(gpu, non_blocking=True).float().mean())
    assert torch.stack(sums).tolist() == [number % 64 for number in range(100)]


@pytest.mark.parametrize("images_are_on", ["cpu", "cuda"])
def test_no_step_waits_for_the_gpu(gpu: torch.device, precision: torch.dtype, images_are_on: str) -> None:
    """A longer epoch has as many synchronisations as a short one."""

    def waits(batch_size: int) -> int:
        images_NHW, _ = toy_data()
        trained = training(SURE, device=gpu, images_NHW=images_NHW.to(images_are_on), batch_size=batch_size, epochs=5)
        for _ in range(4):  # some kernels synchronise the first time, and the capture of a graph does
            trained.train_epoch()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trained.train_epoch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    assert waits(batch_size=4) == waits(batch_size=20)


def test_a_graph_of_a_step_gives_what_the_step_gives(gpu: torch.device) -> None:
    """Also with dropout, whose random numbers are new in each replay, and after a state was loaded."""
    images_NHW, _ = toy_data()
    made = [training(replace(SURE, dropout=0.4), device=gpu, images_NHW=images_NHW.to(gpu), epochs=6) for _ in range(2)]
    graphed, eager = made
    eager._step = eager._train_step
    losses = [[trained.train_epoch() for _ in range(3)] for trained in made]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    graphed.load_state_dict(copy.deepcopy(eager.state_dict()))
    losses = [[trained.train_epoch() for _ in range(3)] for trained in made]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    averaged = [trained.probabilities(range(48)) for trained in made]
    np.testing.assert_allclose(*averaged, atol=0.02)


def test_folds_share_the_memory_of_their_graphs(gpu: torch.device) -> None:
    """Folds that take turns learn what each learns alone."""
    images_NHW = torch.randint(256, (64, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels_N = torch.arange(64) % 4

    def fold(number: int) -> Trainer:
        data = {"images_NHW": images_NHW.to(gpu), "labels_N": labels_N, "train_indices": range(number, 60 + number)}
        return training(replace(SURE, truncation_depth=10), device=gpu, batch_size=15, **data)

    def reserved(folds: list[Trainer]) -> tuple[list[list[float]], int]:
        losses = [[trained.train_epoch() for trained in folds] for _ in range(4)]
        gc.collect()
        torch.cuda.empty_cache()
        return losses, torch.cuda.memory_reserved(gpu)

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(gpu)
    alone = []
    for number in range(4):
        losses, after_one = reserved([fold(number)])
        alone.append([loss for (loss,) in losses])
    together, after_four = reserved([fold(number) for number in range(4)])
    assert np.transpose(together).tolist() == [pytest.approx(losses, rel=0.02) for losses in alone]
    assert after_four - before < 2 * (after_one - before)


def test_trials_of_one_process_leave_no_memory_behind(gpu: torch.device) -> None:
    images_NHW, _ = toy_data()
    reserved = []
    for _ in range(8):
        training(SURE, device=gpu, images_NHW=images_NHW.to(gpu), batch_size=8).train_epoch()  # 5 steps: with a graph
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(gpu))
    assert reserved[-1] == reserved[1]


def test_a_skipped_step_is_not_a_divergence(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in(torch.float16, monkeypatch)
    skipping = at(device)
    skipping.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    assert np.isfinite(skipping.train_epoch())
    assert skipping.scaler.get_scale() < 2.0**40


def test_a_training_goes_on_from_its_state(device: torch.device, precision: torch.dtype) -> None:
    through = at(device)
    losses = [through.train_epoch() for _ in range(2)]
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    losses += [through.train_epoch() for _ in range(2)]
    file.seek(0)
    resumed = at(device)
    resumed.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    assert resumed.epoch == 2 and resumed.scaler.state_dict() == torch.load(_rewound(file), weights_only=True)["scaler"]
    assert [resumed.train_epoch() for _ in range(2)] == pytest.approx(losses[2:], rel=0.05)


def _rewound(file: io.BytesIO) -> io.BytesIO:
    file.seek(0)
    return file


def test_a_state_of_a_gpu_goes_on_on_a_cpu(gpu: torch.device) -> None:
    there, here = at(gpu), at(torch.device("cpu"))
    there.train_epoch()
    here.load_state_dict(there.state_dict())
    assert here.epoch == 1 and here.train_epoch() > 0
    assert all(tensor.device.type == "cpu" for tensor in here.model_state().values())


def test_too_large_a_model_raises_and_leaves_the_memory_to_the_next(gpu: torch.device) -> None:
    def train_large() -> None:
        images = {"images_NHW": torch.zeros(64, 256, 256, dtype=torch.uint8), "labels_N": torch.arange(64) % 4}
        deep = replace(SURE, truncation_depth=49)
        training(deep, device=gpu, train_indices=range(64), batch_size=32, **images).train_epoch()

    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(gpu) + 400 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info(gpu)[1], gpu)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train_large()
        gc.collect()  # a model is a reference cycle
        assert at(gpu).train_epoch() > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
