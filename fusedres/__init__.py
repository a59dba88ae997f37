"""fusedres: residual and dense blocks as fused, drop-in operations.

>>> model = fusedres.convert(torchvision.models.resnet50())
>>> print(fusedres.report(model))
"""

from . import functional, nn, ops
from .conversion import Report, convert, report, revert
from .dispatch import BackendError, backends, use_backend
from .tuning import precompile, tune

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Report",
    "__version__",
    "backends",
    "convert",
    "functional",
    "nn",
    "ops",
    "precompile",
    "report",
    "revert",
    "tune",
    "use_backend",
]
