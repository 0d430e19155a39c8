"""A small YOLO for point targets: YOLOv9's blocks, head and loss, at strides 4 and 8.

The published sizes begin at stride 8 and have millions of weights; a point source fills three
pixels, and there is little to know of it.

    counts, stretched (B, 1, H, W) → stride 2 → 4 → 8 → 16, and back up to 4
    → (B, 4 + classes, N): x0, y0, x1, y1 in pixels of the input, a score for each class
"""

from copy import deepcopy

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from trainer.yolo.libre import ELAN, SPPELAN, AConv, Conv, DDetect, RepConvN, RepNCSPELAN
from trainer.yolo.scenes import CLASSES

STRIDES = (4, 8)
REG_MAX = 8
"""Bins of a side's distance: boxes reach up to 7 strides from their middle, 56 px."""
FIRST_SCORE = -5.0
"""Logit of every class before training: few places hold an object."""


class YoloNetwork(nn.Module):
    """Takes stretched frames; in training, with targets, gives the losses."""

    class Config(BaseModel):
        """width: channels at stride 2; those further down are multiples of it."""

        model_config = ConfigDict(frozen=True, extra="forbid")
        width: int = Field(12, ge=4, le=64, multiple_of=4)
        repeat: int = Field(1, ge=1, le=4)

    def __init__(self, config: Config) -> None:
        super().__init__()
        w, n = config.width, config.repeat
        self.config = config
        self.stem = nn.Sequential(
            Conv(1, w, 3, 2), Conv(w, 2 * w, 3, 2), ELAN(2 * w, 2 * w, w, 2 * w)
        )
        self.down8 = nn.Sequential(AConv(2 * w, 4 * w), RepNCSPELAN(4 * w, 4 * w, 2 * w, 4 * w, n))
        self.down16 = nn.Sequential(
            AConv(4 * w, 6 * w),
            RepNCSPELAN(6 * w, 6 * w, 3 * w, 6 * w, n),
            SPPELAN(6 * w, 3 * w, 6 * w),
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up8 = RepNCSPELAN(10 * w, 4 * w, 2 * w, 4 * w, n)
        self.up4 = RepNCSPELAN(6 * w, 4 * w, 2 * w, 4 * w, n)
        self.head = DDetect(len(CLASSES), (4 * w, 4 * w), reg_max=REG_MAX, stride=STRIDES)
        for tower in self.head.cv3:
            nn.init.constant_(tower[-1].bias, FIRST_SCORE)

    def forward(self, frame_BCHW: Tensor, targets_BK5: Tensor | None = None) -> Tensor:
        """The head's output; with targets (class, x0, y0, x1, y1 as shares; −1: none) the loss."""
        at4 = self.stem(frame_BCHW)
        at8 = self.down8(at4)
        at16 = self.down16(at8)
        up8 = self.up8(torch.cat([self.up(at16), at8], 1))
        up4 = self.up4(torch.cat([self.up(up8), at4], 1))
        if targets_BK5 is not None:
            height, width = frame_BCHW.shape[2:]
            losses = self.head([up4, up8], targets=targets_BK5, img_size=(width, height))
            total: Tensor = losses["total_loss"]
            return total
        decoded: Tensor = self.head([up4, up8])[0]
        return decoded

    def as_engine(self) -> "YoloNetwork":
        """A copy to be exported: parallel convolutions are one, the answer is all there is."""
        network = deepcopy(self).eval()
        network.head.export = True
        for module in network.modules():
            if isinstance(module, RepConvN):
                module.fuse_convs()
        return network
