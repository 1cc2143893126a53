"""The configuration of the main job, checked when it is made."""

from dataclasses import dataclass

from jaxdp import accounting
from jaxdp.checks import check_choice
from jaxdp.schedules import check_number

CLIP_NAMES = ("flat", "per-layer", "automatic", "adaptive", "none")
SCHEDULE_NAMES = ("cosine", "constant")


@dataclass(frozen=True)
class Config:
    """The model, the guarantee and the hyperparameters of a run.

    Attributes:
      model: one of `recipes.models.MODEL_NAMES`.
      epsilon: ε of the whole run; the noise multiplier is calibrated to it.
      delta: δ.
      epochs: passes over the data, in expectation.
      batch_size: expected number of examples per step.
      clip: one of `CLIP_NAMES`. "none" is for Lipschitz models, whose gradients are bounded by
        their design.
      threshold: clip norm C of the whole gradient (initial, if adaptive); None for "none", and
        only there.
      learning_rate: learning rate of SGD with momentum, for gradients averaged over the expected
        batch.
      schedule: schedule of the learning rate, one of `SCHEDULE_NAMES`; "cosine" falls to zero over
        the run, which averages the noise of the last steps away.
      momentum: in [0, 1).
      accountant: "pld" or "rdp".
      microbatch_size: per-sample gradients held at a time; None for a whole physical batch, and
        where nothing is clipped.
      seed: in [0, 2³²), for initialisation, sampling and noise. None draws all of them from the
        operating system: needed for a model that is released, since whoever knows the seed can
        subtract the noise.
    """

    model: str
    epsilon: float
    delta: float = 1e-5
    epochs: float = 20.0
    batch_size: float = 256.0
    clip: str = "flat"
    threshold: float | None = None
    learning_rate: float = 1.0
    schedule: str = "cosine"
    momentum: float = 0.9
    accountant: accounting.AccountantName = "pld"
    microbatch_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs)
        check_number("learning_rate", self.learning_rate)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}. 0.9 is usual.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed must be in [0, 2**32), got {self.seed}. Leave it out to take one from "
                "the operating system."
            )
        check_choice("clip", self.clip, CLIP_NAMES)
        check_choice("schedule", self.schedule, SCHEDULE_NAMES)
        if self.clip != "none" and self.threshold is None:
            raise ValueError(
                f"threshold must be a clip norm for clip {self.clip!r}, got None. 1.0 is usual."
            )
        for field in ("threshold", "microbatch_size"):
            if self.clip == "none" and (given := getattr(self, field)) is not None:
                raise ValueError(
                    f"{field} must be left out where nothing is clipped (clip 'none'), got "
                    f"{given}. Leave it out, or choose a clip."
                )
