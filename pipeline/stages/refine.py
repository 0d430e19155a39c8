"""Off the grid: the targets of each patch fitted together on the censored likelihood."""

from msgspec.structs import replace
from pydantic import Field, model_validator

from pipeline.component import Settings, Stage
from pipeline.imaging.fitting import candidates_of, fitted, window_of
from pipeline.messages import Unmixed
from pipeline.physics.fit import Priors, compile_fit
from pipeline.physics.refine import ADDITIONS, MAX_CHI2, PENALTY, refine
from pipeline.physics.sensor import Sensor


class Refine(Stage[Unmixed, Unmixed]):
    """Takes the network's targets as candidates; keeps, moves, merges or adds by the likelihood.

    Of what a network off the grid has counted, the answer is between its own and the fit's, by how
    sure the number is. Where a group's fit does not converge (UNCONVERGED), leaves the window or
    goes far from where the network saw the targets, the network's answer is kept. A group that
    point sources do not explain is a MISFIT.
    """

    class Config(Settings):
        """penalty: what a target must add to twice the log-likelihood, see `select`.

        starts: how many times to fit what a network off the grid has found. max_chi2: reduced, of
        a group that point sources explain. intensity (lowest and highest, counts) and separation_px
        (least): rules of a benchmark; a sensor has none.
        """

        penalty: float = Field(PENALTY, ge=0.0)
        additions: int = Field(ADDITIONS, ge=0, le=8)
        starts: int = Field(1, ge=1, le=64)
        max_chi2: float = Field(MAX_CHI2, gt=1.0)
        intensity: tuple[float, float] | None = None
        separation_px: float = Field(0.0, ge=0.0)

        @model_validator(mode="after")
        def _in_order(self) -> "Refine.Config":
            if self.intensity is not None and not 0.0 <= self.intensity[0] < self.intensity[1]:
                raise ValueError(f"intensity must be [lowest, highest], got {list(self.intensity)}")
            return self

    def __init__(self, config: Config, sensor: Sensor) -> None:
        super().__init__(config, sensor)
        self._priors = Priors(config.intensity, config.separation_px)
        compile_fit()

    def process(self, message: Unmixed) -> Unmixed:
        """The same patches with targets off the grid; one that is fitted already stays as it is."""
        if message.refined.all():
            return message
        config = self._config
        found = refine(
            window_of(message.patches),
            candidates_of(message),
            self._sensor,
            self._priors,
            penalty=config.penalty,
            additions=config.additions,
            starts=config.starts,
        )
        return replace(message, **fitted(message.patches, found, config.max_chi2))
