"""What the package raises, or catches between its own rooms."""

from __future__ import annotations


class Unsupported(Exception):
    """A block that runs its original modules; the message says why, for ``report``."""

    def anew(self) -> Unsupported:
        """The same without the frames that it has passed, which would be kept with it."""
        return type(self)(*self.args)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve this device or dtype, or it is no complete backend."""
