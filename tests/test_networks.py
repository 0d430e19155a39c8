"""DISTA-Net: its size, that patches do not mix, that it learns, that it survives export."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import small_training

from pipeline.physics.groups import PROFILES
from trainer import registry
from trainer.data import TorchRandom, training_pairs
from trainer.errors import TrainerError
from trainer.export import PARITY_TOLERANCE, write_onnx
from trainer.network import UnmixingNetwork

SMALL = {"stages": 2, "channels": 4, "hidden": 8}


@pytest.fixture(autouse=True)
def _one_thread():
    with small_training():
        yield


def small_network(**settings: object) -> UnmixingNetwork:
    torch.manual_seed(4)
    network = registry.build("dista_net", {**SMALL, **settings})
    network.fit_initial(*pairs(500, c=network.config.c))
    return network


def pairs(number: int, seed: int = 1, c: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    profile = PROFILES["csist-100k"]
    return training_pairs(profile, number, c, "full_scale", TorchRandom(seed), crowded=False)


def test_full_size_is_the_published_one() -> None:
    network = registry.build("dista_net", {})
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_179_104


@pytest.mark.parametrize("c", [3, 5, 7])
def test_map_has_c_by_c_cells_a_pixel(c: int) -> None:
    assert small_network(c=c)(torch.zeros(2, 11, 11)).shape == (2, 11 * c, 11 * c)


def test_initial_map_is_the_least_squares_answer() -> None:
    patch, truth = pairs(3000)
    network = registry.build("dista_net", SMALL)
    network.fit_initial(patch, truth, ridge=1e-6)
    initial = network.get_buffer("initial")
    y, x = patch.flatten(1).double(), truth.flatten(1).double()
    best = torch.linalg.lstsq(y, x).solution
    rest = ((y @ initial.double().T - x) ** 2).mean()
    assert rest == pytest.approx(((y @ best - x) ** 2).mean().item(), rel=1e-3)


def test_output_does_not_depend_on_batch_mates() -> None:
    network = small_network()
    patch, _ = pairs(8)
    others, _ = pairs(8, seed=2)
    with torch.no_grad():
        first = network(patch)[0]
        among_others = network(torch.cat([others, patch[:1]]))[-1]
    torch.testing.assert_close(among_others, first, rtol=0.0, atol=1e-6)


def test_gradient_does_not_depend_on_batch_mates() -> None:
    network = small_network()
    patch, _ = pairs(3)
    patch.requires_grad_(True)
    network(patch)[0].sum().backward()
    assert patch.grad is not None
    assert patch.grad[0].abs().sum() > 0.0
    assert patch.grad[1:].abs().sum() == 0.0


def test_every_parameter_gets_a_gradient() -> None:
    network = small_network()
    network.loss(*pairs(16)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0.0, name


def test_a_few_steps_on_one_batch_lower_the_loss() -> None:
    network = small_network()
    batch = pairs(32)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = network.loss(*batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_onnx_gives_the_same_maps_at_any_batch(tmp_path: Path) -> None:
    openvino = pytest.importorskip("engines.backends.openvino_cpu").openvino
    network = small_network().eval()
    path = tmp_path / "small.onnx"
    write_onnx(network, path)
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]  # no data beside it
    assert all(not node.metadata_props for node in onnx.load(path).graph.node)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for number in (1, 2, 7):
        patch, _ = pairs(number, seed=number)
        with torch.no_grad():
            expected = network(patch).numpy()
        found = compiled(patch.numpy())[0]
        np.testing.assert_allclose(found, expected, rtol=0.0, atol=PARITY_TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"stagse": 2}, "dista_net settings: unknown field `stagse`"),
        ({"stages": 0}, "dista_net settings: stages"),
        ({"c": 4}, "c must be odd, got 4"),
    ],
)
def test_wrong_settings_are_named(settings: dict, fault: str) -> None:
    with pytest.raises(TrainerError, match=fault):
        registry.build("dista_net", settings)
