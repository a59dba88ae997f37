"""The smallest description that still fails: fields set back to their defaults, elements left out, one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from .description import Description

T = TypeVar("T")


def smaller(value: Any) -> Iterator[Any]:
    """The next smaller forms of a description or a tuple of them, the boldest first."""
    if isinstance(value, tuple):
        if len(value) > 2:
            yield value[: len(value) // 2]
            yield value[len(value) // 2 :]
        for i in range(len(value)):
            if len(value) > 1:
                yield (*value[:i], *value[i + 1 :])
        for i, item in enumerate(value):
            for other in smaller(item):
                yield (*value[:i], other, *value[i + 1 :])
    elif isinstance(value, Description):
        for f in fields(value):
            current = getattr(value, f.name)
            if current != f.default:
                yield replace(value, **{f.name: f.default})
        for f in fields(value):
            current = getattr(value, f.name)
            if isinstance(current, Description | tuple):
                for other in smaller(current):
                    yield replace(value, **{f.name: other})
    elif isinstance(value, str) and len(value) > 1 and set(value) <= set("cnadpsi"):
        for i in range(len(value)):
            yield value[:i] + value[i + 1 :]


def size(value: Any) -> tuple[int, int]:
    """How large a description is: what must become smaller in every step, so that shrinking ends."""
    parts = sum(1 for _ in value.features()) if isinstance(value, Description) else len(value)
    return parts, len(repr(value))


def shrink(value: T, fails: Callable[[T], bool], seconds: float = 20.0) -> T:
    """The smallest form of ``value`` found within ``seconds`` for which ``fails`` still holds."""
    end = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for other in smaller(value):
            if time.monotonic() > end:
                return value
            if len(repr(other)) < len(repr(value)) and fails(other):
                value, found = other, True
                break
    return value
