"""The syntax of a Python function, as the interpreter runs it.

A file may have been edited since it was imported, and a function may have been replaced: what is returned is the syntax whose bytecode is
the very one that the function has.
"""

from __future__ import annotations
import __future__

import ast
import functools
import linecache
from collections.abc import Iterator
from types import CodeType, FunctionType

from ..errors import Unsupported

Syntax = ast.FunctionDef | ast.Lambda

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code objects inside ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _first_line(node: ast.AST) -> int:
    """The line at which a function or class begins, as its code object counts it."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])  # type: ignore[attr-defined]


def _candidates(top: ast.stmt, code: CodeType) -> list[Syntax]:
    found = [
        node
        for node in ast.walk(top)
        if isinstance(node, ast.FunctionDef | ast.Lambda)
        and _first_line(node) == code.co_firstlineno
        and code.co_name == (node.name if isinstance(node, ast.FunctionDef) else "<lambda>")
    ]
    if len(found) < 2:
        return found
    # several lambdas in one line: told apart by their columns, which Python knows from 3.11 on; of nested ones the inner
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return []
    columns = [(line, column) for line, _, column, _ in positions() if line is not None and column]
    around = [node for node in found if all(_holds(node.body, *place) for place in columns)]  # type: ignore[arg-type]
    return [node for node in around if not any(other is not node and other in ast.walk(node) for other in around)]


def _holds(node: ast.expr, line: int, column: int) -> bool:
    start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return start <= (line, column) < end


def _imports(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Expr):
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(statement))


@functools.lru_cache(maxsize=1024)
def _syntax(code: CodeType, filename: str) -> Syntax | None:
    module = _parsed("".join(linecache.getlines(filename)))
    if module is None:
        return None
    for top in module.body:
        if not _first_line(top) <= code.co_firstlineno <= (top.end_lineno or 0):
            continue
        candidates = _candidates(top, code)
        if len(candidates) != 1:
            return None
        # of what surrounds a statement at the top its code depends on imports alone (calls of what they bind are compiled otherwise)
        alone = ast.Module([*(s for s in module.body if s is not top and _imports(s)), top], [])
        again = compile(alone, filename, "exec", flags=code.co_flags & _FUTURES, dont_inherit=True)
        return candidates[0] if code in _codes(again) else None
    return None


def syntax(function: FunctionType) -> Syntax:
    """The syntax of ``function``; raises Unsupported where it cannot be read, or is not what runs."""
    found = _syntax(function.__code__, function.__code__.co_filename)
    if found is None:
        raise Unsupported(f"the source of its {function.__qualname__} cannot be read")
    return found
