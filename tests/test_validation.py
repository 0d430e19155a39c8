"""What is measured of a network when it is exported: how sure its answers are."""

import pytest
import torch
from torch import Tensor, nn

from engines.spread import Spread, spread_at
from pipeline.physics.groups import PROFILES
from trainer.network import UnmixingNetwork
from trainer.trained import WEIGHTS, read_weights, with_weights
from trainer.validation import measured_spreads


class Modest(nn.Module):
    """Another network that states deviations of everything twice as large."""

    def __init__(self, network: UnmixingNetwork) -> None:
        super().__init__()
        self.network = network
        self.planes, self.output, self.config = network.planes, network.output, network.config

    def forward(self, patch: Tensor) -> Tensor:
        cells = self.network(patch)
        pixels = self.config.c**2
        cells[:, 4 * pixels :] += torch.log(torch.tensor(2.0))
        return cells


def test_the_factors_make_up_for_what_a_network_overstates() -> None:
    manifest, weights = read_weights(WEIGHTS / "off_grid.pt")
    network = with_weights(manifest.network, manifest.settings, weights).eval()
    (own,), (modest,) = (
        measured_spreads(some, PROFILES["csist-100k"], "full_scale", samples=300)
        for some in (network, Modest(network))
    )
    (stated,) = manifest.spreads
    assert own.sigma_px == stated.sigma_px == 0.5
    for once, twice, shipped in (
        (own.position, modest.position, stated.position),
        (own.intensity, modest.intensity, stated.intensity),
    ):
        assert once == pytest.approx(shipped, abs=0.15)
        # A quarter, but for what the cells of a target disagree about.
        assert 0.22 * once < twice < 0.4 * once


def test_a_network_for_many_sensors_is_measured_at_several_sigmas() -> None:
    manifest, weights = read_weights(WEIGHTS / "off_grid_any.pt")
    network = with_weights(manifest.network, manifest.settings, weights).eval()
    spreads = measured_spreads(network, PROFILES["sensors"], "peak", samples=60)
    assert [s.sigma_px for s in spreads] == [s.sigma_px for s in manifest.spreads]
    assert spreads[0].sigma_px == 0.4
    assert spreads[-1].sigma_px == 1.2


def test_between_the_sigmas_it_was_measured_at() -> None:
    low = Spread(sigma_px=0.4, count=(0.1, 0.2), position=1.0, intensity=2.0)
    high = Spread(sigma_px=0.8, count=(0.3, 0.2), position=2.0, intensity=1.0)
    between = spread_at((high, low), 0.5)
    assert between.sigma_px == 0.5
    assert between.count == pytest.approx((0.15, 0.2))
    assert (between.position, between.intensity) == pytest.approx((1.25, 1.75))
    for sigma_px, end in ((0.3, low), (0.4, low), (2.0, high)):
        assert spread_at((low, high), sigma_px) == end.model_copy(update={"sigma_px": sigma_px})
    assert spread_at((), 0.7) == Spread(sigma_px=0.7)
