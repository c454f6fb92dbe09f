"""Learning rates as functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "polynomial"]


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to a base rate, then decay to a share of it.

    Attributes:
        base: rate after warm-up.
        warmup_steps: steps over which it rises to ``base``; step s of w takes ``s / w`` of it.
        decay: shape of what follows.
        decay_steps: steps from the end of warm-up until ``final`` is reached; it stays there.
        final: share of ``base`` at the end.
        power: exponent of polynomial decay.
    """

    base: float
    warmup_steps: int = 0
    decay: Decay = "constant"
    decay_steps: int = 1
    final: float = 0.0
    power: float = 2.0

    def at(self, step: int) -> float:
        """The rate of a step, counted from 1."""
        if step <= self.warmup_steps:
            return self.base * step / self.warmup_steps
        left = 1 - min((step - self.warmup_steps) / self.decay_steps, 1.0)
        match self.decay:
            case "constant":
                return self.base
            case "linear":
                shape = left
            case "cosine":
                shape = 0.5 * (1 - math.cos(math.pi * left))
            case "polynomial":
                shape = left**self.power
        return self.base * (self.final + (1 - self.final) * shape)
