"""`trainer compile`: a portable model becomes an engine for one target, if it is as good there.

Several variants are built (precisions, streams, patches at a time) and timed. From the fastest on
they are compared with the reference on held-out patches, and the first that is good enough is kept.
An interrupted compilation leaves what was there before (trainer/aside.py).
"""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

from engines.base import Options
from engines.build import SUFFIX, Precision, Target
from engines.loader import misfits, open_engine
from engines.manifest import Manifest, read_manifest
from trainer.aside import aside, move_in
from trainer.build import TAKES, Candidate, Variant, Wish, built, check_portable
from trainer.errors import TrainerError, TrainingFailed
from trainer.parity import HeldOut, Reference, faults, held_out, parity, references
from trainer.timing import timed

CHOICES: dict[Target, tuple[Precision, ...]] = {
    "openvino": ("f32", "bf16", "int8"),
    "torch": ("f32", "bf16"),
    "tensorrt": ("f16",),
    "tensorrt-rtx": ("f16",),
}
"""Precisions tried if none is asked for."""

TILES = (4, 8, 16)
"""Patches at a time tried on a CPU: few keep what a layer hands to the next in its cache."""

MANY = 64
"""Patches that are timed besides one and the batch it is tuned for."""

TIMED_S = 0.3
"""For each of them, of each variant."""


def compile_model(
    model: Path, wish: Wish, out_dir: Path, tell: Callable[[str], None]
) -> tuple[Manifest, list[Candidate]]:
    """Write NAME.TARGET.json and its model file; → its manifest, and all that was tried.

    Raises EngineError for a model that cannot be used, TrainerError for a wish that cannot be,
    TrainingFailed if nothing was good enough: then nothing is written.
    """
    manifest = read_manifest(model.with_suffix(".json"))
    check_portable(model, manifest)
    if wish.precision not in (None, *TAKES[wish.target]):
        raise TrainerError(
            f"--precision {wish.precision}: {wish.target} takes {', '.join(TAKES[wish.target])}"
        )
    name = f"{manifest.name}.{wish.target}"
    with aside(out_dir, name) as folder:
        held = held_out(manifest, wish.patches)
        candidates = []
        for place, variant in enumerate(_variants(wish)):
            path = folder / str(place) / f"{name}.json"
            path.parent.mkdir()
            try:
                made = built(model, manifest, variant, wish, path, tell)
            except TrainerError as error:
                if wish.precision is not None:
                    raise
                tell(f"{variant}: left out: {error}")
                continue
            candidates.append(_timed(made, held, tell))
        tell("comparing with the reference")
        wanted = references(model, manifest, wish.patches)
        for each in wanted:
            tell(
                f"{each.name}: CSO-mAP {each.cso_map:.4f} on {len(each.held.patch)} patches at "
                f"σ {each.held.sigma_px:g} px"
            )
        candidates.sort(key=lambda candidate: candidate.p50_ms)
        best = _first_good(candidates, wanted)
        if best is None:
            reasons = dict.fromkeys(
                f"{c.variant.precision}: {'; '.join(c.wrong)}" for c in candidates
            )
            raise TrainingFailed(
                f"{name}: not good enough ({', '.join(reasons)}); nothing was written"
            )
        files = [best.path.with_suffix(suffix) for suffix in (SUFFIX[wish.target], ".json")]
        move_in(files, out_dir)
    return best.manifest, candidates


def _first_good(candidates: list[Candidate], wanted: list[Reference]) -> Candidate | None:
    """The first of them that is as good as the references; what was found of each is put in.

    One that fails speaks for all of its precision: their maps are the same.
    """
    failed: dict[Precision, tuple[str, ...]] = {}
    for place, candidate in enumerate(candidates):
        precision = candidate.variant.precision
        if precision not in failed:
            compared = candidates[place] = _compared(candidate, wanted)
            if not compared.wrong:
                return compared
            failed[precision] = compared.wrong
        candidates[place] = candidates[place]._replace(wrong=failed[precision])
    return None


def _variants(wish: Wish) -> list[Variant]:
    precisions = (wish.precision,) if wish.precision else CHOICES[wish.target]
    streams, sizes = [1], [wish.max_batch]
    if wish.target == "openvino":
        streams = [1, 2] if (wish.threads or os.cpu_count() or 1) > 1 else [1]
        sizes = [size for size in TILES if size < wish.max_batch] + [wish.max_batch]
    return [Variant(*each, wish.threads) for each in product(precisions, streams, sizes)]


def _timed(candidate: Candidate, held: HeldOut, tell: Callable[[str], None]) -> Candidate:
    """With its latency, if it can be run here."""
    if unfit := misfits(candidate.build):
        tell(f"cannot be run here: {unfit[0]}")
        # A machine without the device may build for it; what it does there is not known yet.
        builds_blind = candidate.build.target.startswith("tensorrt")
        return candidate._replace(wrong=() if builds_blind else tuple(unfit))
    batch = candidate.build.batch
    with open_engine(candidate.path, options=_told(held)) as engine:
        sizes = sorted({1, batch.best, MANY})
        return candidate.with_facts(
            latency=tuple(timed(engine, size, held.patch, TIMED_S) for size in sizes)
        )


def _compared(candidate: Candidate, wanted: list[Reference]) -> Candidate:
    """With its parity where it is worst, and what is wrong with it, if it can be run here."""
    if not candidate.build.latency:
        return candidate
    found = []
    for each in wanted:
        with open_engine(candidate.path, options=_told(each.held)) as engine:
            found.append(parity(engine, each))
    wrong = tuple(line for one in found for line in faults(one, candidate.build.precision))
    worst = max(found, key=lambda one: one.loss)
    return candidate.with_facts(parity=worst)._replace(wrong=wrong)


def _told(held: HeldOut) -> Options:
    return Options(sigma_px=held.sigma_px)
