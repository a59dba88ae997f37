"""From a description to the network: its Python is compiled as a module of its own, which stands in ``sys.modules`` and, for ``inspect``,
in ``linecache``, as that of a user does."""

from __future__ import annotations

import itertools
import linecache
import sys
import types

import torch
from torch import nn

from .description import Network
from .source import Writer

_serial = itertools.count()


class Built:
    """A network's Python module, to be closed when nobody needs it any more; ``make()`` gives the network."""

    def __init__(self, network: Network) -> None:
        self.text = Writer(network).write()
        self.name = f"fusedres_fuzzed_{next(_serial)}"
        self._file = f"<{self.name}>"
        self.module = types.ModuleType(self.name)
        self.module.__file__ = self._file
        linecache.cache[self._file] = (len(self.text), None, self.text.splitlines(True), self._file)
        sys.modules[self.name] = self.module
        try:
            exec(compile(self.text, self._file, "exec"), self.module.__dict__)
        except BaseException:
            self.close()
            raise

    def make(self) -> nn.Module:
        made = self.module.Net()
        for parameter in made.parameters():
            if parameter.dim() < 4:  # statistics and scales away from their initial zeros and ones
                with torch.no_grad():
                    parameter.add_(torch.rand_like(parameter) - 0.3)
        for buffer in made.buffers():
            if buffer.is_floating_point() and buffer.dim():
                buffer.add_(torch.rand_like(buffer) * 0.5)
        return made

    def close(self) -> None:
        """Forget the module."""
        sys.modules.pop(self.name, None)
        linecache.cache.pop(self._file, None)

    def __enter__(self) -> Built:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
