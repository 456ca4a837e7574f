"""The floor of a step counts the operations of the network."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor
from benchmarks.training import TINY, batch_of
from cmran.config import ModelConfig
from cmran.model.losses import compute_loss
from cmran.model.network import CMRAN

CPU = torch.device("cpu")
UNEVEN = ModelConfig(
    mode="weak", visual_features=24, audio_features=24, width=12, heads=3, layers=3, feedforward=20, bottleneck=6,
    spatial_width=10,
)  # fmt: skip


@pytest.mark.parametrize("config", [TINY, UNEVEN, ModelConfig()], ids=["tiny", "uneven", "published"])
@pytest.mark.parametrize("training", [False, True])
def test_operations(config, training):
    videos = 3 if config.width < 100 else 1
    # float64: the counter does not know the kernels of float32 and bfloat16.
    model = CMRAN(config).double().train(training)
    visual, audio, labels = (x.double() for x in batch_of(config, videos))
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training):
        outputs = model(visual, audio)
        if training:
            compute_loss(outputs, labels if config.mode == "full" else labels.mean(1), config.mode).backward()
    counted = sum(product.operations for product in floor.products(config, videos, training=training))
    assert counted == counter.get_total_flops()


def test_operations_of_the_published_step():
    operations = sum(product.operations for product in floor.products(ModelConfig(), 32, training=True))
    # Quoted in docs/performance-log.md.
    assert round(operations / 1e9) == 71


def test_a_floor_is_operations_over_rate_and_bytes_over_bandwidth(monkeypatch):
    monkeypatch.setattr(floor, "rate", lambda *shape: 1e9)
    monkeypatch.setattr(floor, "bandwidth", lambda device: 1e6)
    operations = sum(product.operations for product in floor.products(TINY, 4, training=True))
    weights = sum(weight.numel() for weight in CMRAN(TINY).parameters())
    values = 4 * 10 * 49 * TINY.visual_features
    for precision, size in (("bfloat16", 2), ("float32", 4)):
        expected = operations / 1e9 + (values * size + 7 * 4 * weights) / 1e6
        assert floor.step_seconds(TINY, precision, 4, CPU) == pytest.approx(expected)
    forward = sum(product.operations for product in floor.products(TINY, 4, training=False))
    assert floor.forward_seconds(TINY, "float32", 4, CPU) == pytest.approx(forward / 1e9 + 4 * values / 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [1, 5])
def test_rates_are_measured(dtype, pairs, monkeypatch):
    monkeypatch.setattr(floor, "SECONDS", 0.001)
    monkeypatch.setattr(floor, "COPIED_BYTES", 1 << 16)
    for measured in (floor.rate, floor.bandwidth):
        measured.cache_clear()
    try:
        assert floor.rate(8, 4, 6, pairs, dtype, CPU) > 0
        assert floor.bandwidth(CPU) > 0
    finally:
        for measured in (floor.rate, floor.bandwidth):
            measured.cache_clear()


def test_least_seconds_is_the_minimum_of_the_measurements(monkeypatch):
    taken = iter([5.0, 5.0, 3.0, 2.0, 4.0, 3.0, 3.0])
    now = 0.0

    def work():
        nonlocal now
        now += next(taken)

    monkeypatch.setattr(floor.time, "perf_counter", lambda: now)
    assert floor.least_seconds(work, CPU) == 2.0
