"""What is measured of a network when it is exported: how sure its answers are."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.physics.groups import PROFILES
from trainer.network import UnmixingNetwork
from trainer.trained import WEIGHTS, read_weights, with_weights
from trainer.validation import measured_position_spread

SPREAD = (0.0222, 0.0046)


class Modest(nn.Module):
    """Another network that states deviations of positions twice as large."""

    def __init__(self, network: UnmixingNetwork) -> None:
        super().__init__()
        self.network = network
        self.planes, self.output, self.config = network.planes, network.output, network.config

    def forward(self, patch: Tensor) -> Tensor:
        cells = self.network(patch)
        pixels = self.config.c**2
        cells[:, 4 * pixels : 6 * pixels] += torch.log(torch.tensor(2.0))
        return cells


def test_the_factor_makes_up_for_what_a_network_overstates() -> None:
    manifest, weights = read_weights(WEIGHTS / "off_grid.pt")
    network = with_weights(manifest.network, manifest.settings, weights).eval()
    own, modest = (
        measured_position_spread(some, PROFILES["csist-100k"], "full_scale", SPREAD, samples=300)
        for some in (network, Modest(network))
    )
    assert own == pytest.approx(manifest.position_spread, abs=0.12)
    # A quarter, but for what the cells of a target disagree about.
    assert 0.22 * own < modest < 0.4 * own
