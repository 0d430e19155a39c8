"""The curves of a run: a picture, and a file for TensorBoard."""

import math
from collections.abc import Sequence
from pathlib import Path

from trainer.fit_config import FitConfig
from trainer.progress import patches_per_s

PICTURE = "loss.png"
EVENTS = "events.out.tfevents.fit"
"""TensorBoard takes a file for its own by `tfevents` in the name."""

Records = Sequence[dict[str, float]]


def draw_curves(records: Records, config: FitConfig, folder: Path) -> None:
    """Both files anew in the folder of a run, from its records: nothing twice, nothing undone."""
    draw_picture(records, folder / PICTURE, config.network)
    write_events(records, config, folder / EVENTS)


def draw_picture(records: Records, path: Path, title: str) -> None:
    """Training loss; CSO-mAP and AP at each threshold on held-out patches; over samples seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    samples = [record["samples"] for record in records]
    loss = [record["loss"] for record in records]
    left.plot(samples, loss, color="black")
    left.set_yscale("log" if min(loss) > 0.0 else "linear")  # a likelihood's may be negative
    left.set(xlabel="samples seen", ylabel="training loss", title=title)
    right.plot(
        samples, [record["cso_map"] for record in records], color="black", lw=2, label="CSO-mAP"
    )
    for key in sorted({key for record in records for key in record if key.startswith("ap_")}):
        curve = [record.get(key, math.nan) for record in records]  # an old log lacks it
        right.plot(samples, curve, lw=1, label=f"AP at {key.removeprefix('ap_')} px")
    right.set(xlabel="samples seen", title="held-out patches", ylim=(0.0, 1.0))
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=100)


def write_events(records: Records, config: FitConfig, path: Path) -> None:
    """TensorBoard's file of a run: what the log holds, learning_rate and patches_per_s by step.

    Time is that of training. The same records give the same bytes, so a TensorBoard that follows
    the file finds what it has read unchanged.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    writer = RecordWriter(str(path))
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for record, rate in zip(records, patches_per_s(records), strict=True):
        scalars = {key: record[key] for key in record if key not in ("step", "samples", "seconds")}
        scalars["learning_rate"] = config.learning_rate * config.rate(int(record["step"]) - 1)
        scalars["patches_per_s"] = rate
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(
            wall_time=record["seconds"], step=int(record["step"]), summary=Summary(value=values)
        )
        writer.write(event.SerializeToString())
    writer.close()
