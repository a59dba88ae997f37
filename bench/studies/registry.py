"""All studies, by the names that the command knows."""

from __future__ import annotations

from . import degradation, dense, depth, gradients, lesions, refinement, shortcuts
from .study import Study

STUDIES: dict[str, Study] = {
    "degradation": degradation.STUDY,
    "gradients": gradients.STUDY,
    "lesions": lesions.STUDY,
    "refinement": refinement.STUDY,
    "shortcuts": shortcuts.STUDY,
    "dense": dense.STUDY,
    "depth": depth.STUDY,
}
