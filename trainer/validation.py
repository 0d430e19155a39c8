"""How good a network is while it trains: its score on patches it never sees."""

import torch

from engines.manifest import Output
from engines.scaling import Plane, Scaling
from pipeline.physics.groups import Profile, draw_patches
from trainer.data import TorchRandom
from trainer.fit_config import DETECTION_THRESHOLD, VALIDATION_SEED
from trainer.metrics import CsoMap, cso_map
from trainer.reading import detections, read_maps
from trainer.units import to_network_units

_PATCHES_AT_ONCE = 256


def held_out_cso_map(
    network: torch.nn.Module,
    planes: tuple[Plane, ...],
    output: Output,
    c: int,
    profile: Profile,
    scaling: Scaling,
    samples: int,
    device: str,
) -> CsoMap:
    """CSO-mAP of a network on `samples` held-out patches of the profile, always the same."""
    patch, groups = draw_patches(profile, samples, TorchRandom(VALIDATION_SEED))
    seen, unit, _ = to_network_units(
        patch, profile.sensor, scaling, background=profile.background > 0.0, planes=planes
    )
    with torch.no_grad():
        maps = [network(part.to(device)).cpu() for part in seen.split(_PATCHES_AT_ONCE)]
    maps_B = torch.cat(maps).float().numpy()
    read = read_maps(maps_B, unit.numpy(), output, c, DETECTION_THRESHOLD)
    true = [
        xy_px[:count]
        for xy_px, count in zip(groups.xy_px.numpy(), groups.count.tolist(), strict=True)
    ]
    return cso_map(detections(read, samples), true)
