"""INT8 in training: rounds as the engine will, and leaves a network that is the same otherwise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_training
from onnx.reference import ReferenceEvaluator
from test_precision import error, inputs

from engines.loader import MODELS
from trainer import registry
from trainer.fit import Run, averaged_weights, load_checkpoint, network_of
from trainer.fit_config import FitConfig
from trainer.int8 import quantized
from trainer.precision import read_model
from trainer.rounding import RoundedConv2d, round_to_int8, rounded, smoothing
from trainer.trained import WEIGHTS, with_weights


def test_rounds_to_steps_and_passes_the_gradient() -> None:
    exact = torch.tensor([-1.0, -0.4961, 0.0, 0.003, 1.0], requires_grad=True)
    found = rounded(exact, torch.tensor(1.0))
    steps = found.detach() * 127.0
    np.testing.assert_allclose(steps, [-127.0, -63.0, 0.0, 0.0, 127.0], atol=1e-4)
    (found * torch.arange(5.0)).sum().backward()
    np.testing.assert_array_equal(exact.grad, np.arange(5.0))


def test_smoothing_leaves_one_range_that_all_channels_nearly_fill() -> None:
    size, weight = np.array([0.1, 10.0]), np.array([1.0, 1.0])
    factor, largest = smoothing(size, weight)
    evened = size / factor
    assert largest == evened.max()
    assert evened.min() > 0.6 * evened.max()
    dark, _ = smoothing(np.zeros(2), np.zeros(2))  # a channel that is never lit
    assert np.isfinite(dark).all() and (dark > 0.0).all()


@pytest.mark.parametrize("name", ["off_grid", "off_grid_any"])
def test_rounds_as_the_engine_does(name: str) -> None:
    network = network_of(WEIGHTS / f"{name}.pt").eval()
    names = list(network.state_dict())
    given = inputs(name, 64)
    wanted = {key: torch.from_numpy(value) for key, value in given.items()}
    with torch.no_grad():
        exact = network.as_engine()(*wanted.values()).numpy()
        round_to_int8(network)
        trained = network.as_engine()(*wanted.values()).numpy()
    assert list(network.state_dict()) == names
    kinds = [type(m) is RoundedConv2d for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kinds == [False] + [True] * 8 + [False]
    eight = quantized(read_model(MODELS / f"{name}.onnx"), given)
    (engine,) = ReferenceEvaluator(eight).run(None, given)
    lost = error(engine, exact)
    assert 0.0 < error(trained, engine) < 0.7 * lost


def test_a_rounded_run_gives_a_plain_network(tmp_path: Path) -> None:
    config = FitConfig(
        network="off_grid",
        settings={"channels": 4, "blocks": 1},
        samples=32,
        batch=8,
        rounding="int8",
        validate_every=2,
        validate_samples=8,
    )
    with small_training():
        run = Run(config, tmp_path)
        assert any(isinstance(module, RoundedConv2d) for module in run.network.modules())
        before = [weight.clone() for weight in run.network.parameters()]
        assert len(list(run.train())) == 2
        changed = [
            not torch.equal(*pair) for pair in zip(before, run.network.parameters(), strict=True)
        ]
        assert all(changed)
        again = Run(config, tmp_path)
        assert again.resume()
    weights = averaged_weights(load_checkpoint(tmp_path / "checkpoint.pt"))
    plain = with_weights("off_grid", config.settings, weights)
    assert not any(isinstance(module, RoundedConv2d) for module in plain.modules())
    assert list(plain.state_dict()) == list(
        registry.build("off_grid", config.settings).state_dict()
    )
