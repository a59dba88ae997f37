"""Measured plans: ``tune`` finds out how each convolution of a model runs best here, ``precompile`` compiles what it launches."""

from .precompile import precompile
from .tune import Tuned, TuningReport, tune

__all__ = ["Tuned", "TuningReport", "precompile", "tune"]
