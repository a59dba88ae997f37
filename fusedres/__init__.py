"""fusedres: residual and dense blocks as fused, drop-in operations.

>>> model = fusedres.convert(torchvision.models.resnet50())
>>> print(fusedres.report(model))
"""

from . import functional, nn, ops
from .backends.select import backends, use_backend
from .convert import convert, export_plain, revert
from .errors import BackendError
from .graphs import graphed
from .memory import release_memory
from .prepack import prepack
from .report import Report, report
from .serving import export_cpp, library_path
from .tuning import precompile, tune
from .verify import verify
from .version import __version__

__all__ = [
    "BackendError",
    "Report",
    "__version__",
    "backends",
    "convert",
    "export_cpp",
    "export_plain",
    "functional",
    "graphed",
    "library_path",
    "nn",
    "ops",
    "precompile",
    "prepack",
    "release_memory",
    "report",
    "revert",
    "tune",
    "use_backend",
    "verify",
]
