"""Draw what each detector finds in a frame of each video: `detectors_over_clips.py OUT.png VIDEO…`.

A row a video, a column a detector. `temporal` has seen the 55 frames before; `local_contrast` runs
as configs/clutter.yaml has it, the others with their defaults. Needs irst-pipeline.
"""

import sys

import cv2
import numpy as np

from pipeline.component import Context
from pipeline.evaluation.run import UNKNOWN_CAMERA
from pipeline.physics.sensor import Sensor
from pipeline.stages.detect import Detect

FRAME = 55
DETECTORS = {name: Detect.Config(detector={"kind": name}) for name in ("matched_filter", "top_hat")}
DETECTORS |= {
    "temporal": Detect.Config(detector={"kind": "temporal"}),
    "local_contrast": UNKNOWN_CAMERA,
}


def main() -> None:
    """Write the picture."""
    out, *videos = sys.argv[1:]
    rows = []
    for path in videos:
        video = cv2.VideoCapture(path)
        frames = [video.read()[1][..., 0] for _ in range(FRAME + 1)]
        panels = []
        for name, config in DETECTORS.items():
            stage = Detect.build(config, Context(Sensor(full_scale=255)))
            for frame in frames if name == "temporal" else frames[-1:]:
                found = stage.search(np.ascontiguousarray(frame))
            panel = cv2.cvtColor(frames[-1], cv2.COLOR_GRAY2BGR)
            for x, y in np.rint(found.points.xy_px).astype(int).tolist():
                cv2.rectangle(panel, (x - 5, y - 5), (x + 5, y + 5), (60, 255, 60), 1)
            text = f"{name}: {len(found.points.snr)}"
            cv2.putText(panel, text, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1)
            panels.append(panel)
        rows.append(np.hstack(panels))
    cv2.imwrite(out, np.vstack(rows))


if __name__ == "__main__":
    main()
