"""Following a forward: its syntax, statement by statement, with a symbol in the place of the map.

Nothing of it is executed. What stands here is what is understood; everything else (a store on the module, where that is not told, another
``with`` than that of a gradient mode, a ``while``, an exception, an import, a branch on what a map holds) raises :class:`~.trace.Refused`
with what it is.
"""

from __future__ import annotations

import ast
import operator
from types import FunctionType
from typing import Any

from torch import nn

from . import harmless
from .effects import Effects
from .lookup import Bound, Frame, Local, Super, is_list
from .modules import class_of, has_own_code
from .trace import MISSING, Node, Refused, Traced, as_nodes, holds_traced, is_plain

#: statements, further than any forward that is a block's goes
MOST_STATEMENTS = 20_000


class _Left(Exception):
    """A loop is left, or its next round begun."""

    def __init__(self, over: bool) -> None:
        super().__init__()
        self.over = over


class _Returned(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _said(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 60 else f"{text[:57]}..."


class Evaluator(Effects):
    """Follows the forward of a module."""

    _statements = 0

    def forward(self) -> tuple[str, Node, Any]:
        """``(the name of the parameter, the node of the map, what is returned)`` of the root's forward; raises Refused."""
        cls = class_of(self.root)
        if has_own_code(self.root):
            raise Refused(f"the forward of its {cls.__name__} is overridden")
        function = self.reads.outside.attribute(cls, "forward")
        start = Node("input", "input")
        self.nodes.append(start)
        target = self.attribute(self.root, "forward")
        code = getattr(function, "__code__", None)
        if code is None or code.co_argcount != 2 or code.co_kwonlyargcount or len(code.co_varnames) < 2:
            raise Refused(f"the forward of {cls.__name__} takes more than a map")
        return code.co_varnames[1], start, as_nodes(self.call(target, (Traced(start),), {}))

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the root's forward returns for ``args`` and ``kwargs``, which hold :class:`~.trace.Traced` in the places of maps; lists
        among them are their maker's. Raises Refused."""
        if has_own_code(self.root):
            raise Refused(f"the forward of its {class_of(self.root).__name__} is overridden")
        self.given = [value for value in (*args, *kwargs.values()) if isinstance(value, list)]
        found = self.call(self.attribute(self.root, "forward"), args, kwargs)
        if any(found is value for value in self.given):
            raise Refused("its forward returns a list that it is given")
        return as_nodes(found)

    # ---- statements --------------------------------------------------------------------------------------------------

    def body(self, node: ast.FunctionDef | ast.Lambda, frame: Frame) -> Any:
        if isinstance(node, ast.Lambda):
            return self.value(node.body, frame)
        try:
            self._block(node.body, frame)
        except _Returned as returned:
            return returned.value
        return None

    def _block(self, statements: list[ast.stmt], frame: Frame) -> None:
        for statement in statements:
            self._statements += 1
            if self._statements > MOST_STATEMENTS:
                raise Refused("its forward is longer than a block's")
            handler = self._HANDLERS.get(type(statement))
            if handler is None:
                raise Refused(f"{frame.name} does what cannot be followed: {_said(statement)}")
            handler(self, statement, frame)

    def _return(self, node: ast.Return, frame: Frame) -> None:
        raise _Returned(None if node.value is None else self.value(node.value, frame))

    def _expression(self, node: ast.Expr, frame: Frame) -> None:
        if not isinstance(node.value, ast.Constant):
            self.value(node.value, frame)

    def _assign(self, node: ast.Assign, frame: Frame) -> None:
        value = self.value(node.value, frame)
        for target in node.targets:
            self._store(target, value, frame)

    def _annotated(self, node: ast.AnnAssign, frame: Frame) -> None:
        if node.value is not None:
            self._store(node.target, self.value(node.value, frame), frame)

    def _store(self, target: ast.expr, value: Any, frame: Frame) -> None:
        if isinstance(target, ast.Name):
            frame.names[target.id] = value
        elif isinstance(target, ast.Attribute) and self.beside is not None:
            self.set_attribute(
                self.value(target.value, frame), target.attr, value, f"{frame.name} stores {_said(target)}"
            )
        elif isinstance(target, ast.Subscript) and self.beside is not None:
            owner, at = self.value(target.value, frame), self.value(target.slice, frame)
            self.set_item(owner, at, value, f"{frame.name} stores {_said(target)}")
        elif isinstance(target, ast.Tuple | ast.List) and not any(isinstance(t, ast.Starred) for t in target.elts):
            if isinstance(value, Traced):
                parts: list[Any] = [self._item(value, i) for i in range(len(target.elts))]
            else:
                parts = self.items(value)
            if len(parts) != len(target.elts):
                raise Refused(f"{frame.name} unpacks {len(parts)} values into {_said(target)}")
            for part, place in zip(parts, target.elts, strict=True):
                self._store(place, part, frame)
        else:
            raise Refused(f"{frame.name} stores {_said(target)}")

    def _augmented(self, node: ast.AugAssign, frame: Frame) -> None:
        if isinstance(node.target, ast.Attribute) and self.beside is not None:
            what = f"{frame.name} stores {_said(node.target)}"
            owner, name = self.value(node.target.value, frame), node.target.attr
            self.stores(owner, name, what)
            before = self.value(node.target, frame)
            self.set_attribute(owner, name, self._changed(before, self.value(node.value, frame), node, frame), what)
            return
        if not isinstance(node.target, ast.Name):
            raise Refused(f"{frame.name} stores {_said(node.target)}")
        name = node.target.id
        if name not in frame.names:
            raise Refused(f"{frame.name} changes {name}, which is not its own")
        frame.names[name] = self._changed(frame.names[name], self.value(node.value, frame), node, frame)

    def _changed(self, before: Any, by: Any, node: ast.AugAssign, frame: Frame) -> Any:
        """``before op= by``, which overwrites a map, and makes another value of what is a number."""
        kind = type(node.op).__name__
        if isinstance(before, list) or isinstance(before, Traced) and is_list(before.node):
            raise Refused(f"{frame.name} changes a list in place")
        (before,) = self.symbols((before,))
        if not isinstance(before, Traced) or not before.node.is_map:
            return self._binary(kind, before, by, node, frame)
        if kind not in harmless.AUGMENTED:
            raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
        return self.record("function", harmless.AUGMENTED[kind], (before, by), {}, True)

    def _with(self, node: ast.With, frame: Frame) -> None:
        modes = [self._grad_mode(item, frame) for item in node.items]
        if None in modes:
            raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
        with self.in_grad_mode(bool(modes[-1])):
            self._block(node.body, frame)

    def _grad_mode(self, item: ast.withitem, frame: Frame) -> bool | None:
        call = item.context_expr
        if not isinstance(call, ast.Call) or call.keywords or item.optional_vars is not None or self.beside is None:
            return None
        return self.grad_mode(self.value(call.func, frame), [self.value(argument, frame) for argument in call.args])

    def _if(self, node: ast.If, frame: Frame) -> None:
        self._block(node.body if self._truth(node.test, frame) else node.orelse, frame)

    def _for(self, node: ast.For, frame: Frame) -> None:
        if node.orelse:
            raise Refused(f"{frame.name} does what cannot be followed: for ... else")
        for item in self.items(self.value(node.iter, frame)):
            self._store(node.target, item, frame)
            try:
                self._block(node.body, frame)
            except _Left as left:
                if left.over:
                    break

    def _break(self, node: ast.Break, frame: Frame) -> None:
        raise _Left(True)

    def _continue(self, node: ast.Continue, frame: Frame) -> None:
        raise _Left(False)

    def _pass(self, node: ast.Pass, frame: Frame) -> None:
        return None

    def _assert(self, node: ast.Assert, frame: Frame) -> None:
        if not self._truth(node.test, frame):
            raise Refused(f"{frame.name} asserts {_said(node.test)}, which is not so")

    def _delete(self, node: ast.Delete, frame: Frame) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name) or target.id not in frame.names:
                raise Refused(f"{frame.name} deletes {_said(target)}")
            del frame.names[target.id]

    def _define(self, node: ast.FunctionDef, frame: Frame) -> None:
        if node.decorator_list:
            raise Refused(f"{frame.name} decorates {node.name}")
        frame.names[node.name] = self._made(node, frame)

    def _made(self, node: ast.FunctionDef | ast.Lambda, frame: Frame) -> Local:
        refused = (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
        body = node.body if isinstance(node.body, list) else [node.body]
        if node.args.kw_defaults or any(isinstance(inner, refused) for part in body for inner in ast.walk(part)):
            raise Refused(f"{frame.name} defines a function that cannot be followed")
        return Local(node, frame, tuple(self.value(default, frame) for default in node.args.defaults))

    _HANDLERS: dict[type[ast.stmt], Any] = {
        ast.Return: _return,
        ast.Expr: _expression,
        ast.Assign: _assign,
        ast.AnnAssign: _annotated,
        ast.AugAssign: _augmented,
        ast.With: _with,
        ast.If: _if,
        ast.For: _for,
        ast.Break: _break,
        ast.Continue: _continue,
        ast.Pass: _pass,
        ast.Assert: _assert,
        ast.Delete: _delete,
        ast.FunctionDef: _define,
    }

    # ---- expressions -------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr, frame: Frame) -> Any:
        """What an expression gives; raises Refused."""
        evaluate = self._EXPRESSIONS.get(type(node))
        if evaluate is None:
            raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
        return evaluate(self, node, frame)

    def _truth(self, node: ast.expr, frame: Frame) -> bool:
        return self._bool(self.value(node, frame), node, frame)

    def _bool(self, value: Any, node: ast.expr, frame: Frame) -> bool:
        if isinstance(value, Traced):
            raise Refused(f"{frame.name} branches on a map: {_said(node)}")
        if isinstance(value, nn.Module):
            cls = class_of(value)
            if not hasattr(cls, "__bool__") and not hasattr(cls, "__len__"):
                return True
            return len(self.children(value)) > 0
        if isinstance(value, FunctionType | Bound | Local):
            return True
        if not (is_plain(value) or isinstance(value, list | tuple)):
            raise Refused(f"{frame.name} branches on a {type(value).__name__}: {_said(node)}")
        return bool(value)

    def _constant(self, node: ast.Constant, frame: Frame) -> Any:
        return node.value

    def _name(self, node: ast.Name, frame: Frame) -> Any:
        return self.name(frame, node.id)

    def _attribute(self, node: ast.Attribute, frame: Frame) -> Any:
        found = self.attribute(self.value(node.value, frame), node.attr)
        if found is MISSING:
            raise Refused(f"{frame.name} reads {_said(node)}, which is not there")
        return found

    def _call(self, node: ast.Call, frame: Frame) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.keywords:
            return self._super(node, frame)
        target = self.value(node.func, frame)
        args: list[Any] = []
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                args += self.items(self.value(argument.value, frame))
            else:
                args.append(self.value(argument, frame))
        kwargs: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
            kwargs[keyword.arg] = self.value(keyword.value, frame)
        return self.call(target, tuple(args), kwargs)

    def _super(self, node: ast.Call, frame: Frame) -> Super:
        if self.name(frame, "super") is not super:
            raise Refused(f"{frame.name} calls another super()")
        if node.args:
            after, module = (*(self.value(argument, frame) for argument in node.args), None)[:2]
        else:
            first = frame.function.__code__.co_varnames[:1]
            after, module = self.name(frame, "__class__"), frame.names.get(first[0]) if first else None
        if not isinstance(after, type) or not isinstance(module, nn.Module):
            raise Refused(f"{frame.name} calls super() of what is no module")
        return Super(after, module)

    def _subscript(self, node: ast.Subscript, frame: Frame) -> Any:
        owner, at = self.value(node.value, frame), self.value(node.slice, frame)
        return self._item(owner, at)

    def _item(self, owner: Any, at: Any) -> Any:
        if isinstance(owner, Traced):
            return self.record("function", operator.getitem, (owner, at), {})
        if holds_traced(at):
            raise Refused("its forward looks up what a map tells")
        if isinstance(owner, nn.ModuleDict) and isinstance(at, str):
            self.children(owner)
            found = owner._modules.get(at, MISSING)
        elif isinstance(owner, nn.Module):
            found = self.tried(operator.getitem, self.children(owner), at)
            if isinstance(found, list):
                raise Refused(f"its forward takes a part of a {type(owner).__name__}")
        elif isinstance(owner, list | tuple | str):
            found = self.tried(operator.getitem, owner, at)
        else:
            raise Refused(f"its forward reads from a {type(owner).__name__}, which may change unseen")
        if found is MISSING:
            raise Refused(f"its forward reads {at}, which is not there")
        return found

    def _slice(self, node: ast.Slice, frame: Frame) -> slice:
        parts = (None if part is None else self.value(part, frame) for part in (node.lower, node.upper, node.step))
        return slice(*parts)

    def _tuple(self, node: ast.Tuple, frame: Frame) -> Any:
        return tuple(self._elements(node.elts, frame))

    def _list(self, node: ast.List, frame: Frame) -> Any:
        return self._elements(node.elts, frame)

    def _elements(self, nodes: list[ast.expr], frame: Frame) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found += self.items(self.value(node.value, frame))
            else:
                found.append(self.value(node, frame))
        return found

    def _choice(self, node: ast.IfExp, frame: Frame) -> Any:
        return self.value(node.body if self._truth(node.test, frame) else node.orelse, frame)

    def _boolean(self, node: ast.BoolOp, frame: Frame) -> Any:
        stops_at = isinstance(node.op, ast.Or)
        value = None
        for operand in node.values[:-1]:
            value = self.value(operand, frame)
            if self._bool(value, operand, frame) is stops_at:
                return value
        return self.value(node.values[-1], frame)

    def _unary(self, node: ast.UnaryOp, frame: Frame) -> Any:
        value, kind = self.value(node.operand, frame), type(node.op).__name__
        if kind == "Not":
            return not self._bool(value, node.operand, frame)
        if kind not in harmless.UNARY:
            raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
        if isinstance(value, Traced):
            return self.record("function", harmless.UNARY[kind], (value,), {})
        return self.static(harmless.UNARY[kind], (value,), {})

    def _operation(self, node: ast.BinOp, frame: Frame) -> Any:
        left, right = self.value(node.left, frame), self.value(node.right, frame)
        return self._binary(type(node.op).__name__, left, right, node, frame)

    def _binary(self, kind: str, left: Any, right: Any, node: ast.AST, frame: Frame) -> Any:
        if kind not in harmless.BINARY:
            raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
        target = harmless.BINARY[kind]
        left, right = self.symbols((left, right))
        if isinstance(left, list) and isinstance(right, list) and kind == "Add":
            return left + right
        if isinstance(left, tuple) and isinstance(right, tuple) and kind == "Add":
            return left + right
        if holds_traced((left, right)):
            return self.record("function", target, (left, right), {})
        return self.static(target, (left, right), {})

    def _compare(self, node: ast.Compare, frame: Frame) -> Any:
        left = self.value(node.left, frame)
        for operation, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.value(comparator, frame)
            if not self._holds(type(operation).__name__, left, right, node, frame):
                return False
            left = right
        return True

    def _holds(self, kind: str, left: Any, right: Any, node: ast.Compare, frame: Frame) -> bool:
        if kind in ("Is", "IsNot") and (left is None or right is None):
            other = right if left is None else left
            if isinstance(other, Traced) and not other.node.is_tensor:
                raise Refused(f"{frame.name} branches on what a module returns: {_said(node)}")
            return (other is None) is (kind == "Is")
        if not all(is_plain(value) or isinstance(value, type) or _plain_list(value) for value in (left, right)):
            raise Refused(f"{frame.name} compares what may change: {_said(node)}")
        return bool(self.tried(harmless.COMPARED[kind], left, right))

    def _string(self, node: ast.JoinedStr, frame: Frame) -> str:
        parts: list[str] = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self.value(part.value, frame)
                if part.format_spec is not None or part.conversion != -1 or not is_plain(value):
                    raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
                parts.append(format(value))
            else:
                parts.append(str(self.value(part, frame)))
        return "".join(parts)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp, frame: Frame) -> list[Any]:
        found: list[Any] = []
        # names that it sets are its own
        inner = Frame(frame.name, {}, frame.function, frame)

        def run(generators: list[ast.comprehension]) -> None:
            if not generators:
                found.append(self.value(node.elt, inner))
                return
            first, *rest = generators
            for item in self.items(self.value(first.iter, inner)):
                self._store(first.target, item, inner)
                if all(self._truth(test, inner) for test in first.ifs):
                    run(rest)

        if any(generator.is_async for generator in node.generators):
            raise Refused(f"{frame.name} does what cannot be followed: {_said(node)}")
        run(node.generators)
        return found

    def _named(self, node: ast.NamedExpr, frame: Frame) -> Any:
        value = self.value(node.value, frame)
        self._store(node.target, value, frame)
        return value

    def _lambda(self, node: ast.Lambda, frame: Frame) -> Local:
        return self._made(node, frame)

    _EXPRESSIONS: dict[type[ast.expr], Any] = {
        ast.Constant: _constant,
        ast.Name: _name,
        ast.Attribute: _attribute,
        ast.Call: _call,
        ast.Subscript: _subscript,
        ast.Slice: _slice,
        ast.Tuple: _tuple,
        ast.List: _list,
        ast.IfExp: _choice,
        ast.BoolOp: _boolean,
        ast.UnaryOp: _unary,
        ast.BinOp: _operation,
        ast.Compare: _compare,
        ast.JoinedStr: _string,
        ast.ListComp: _comprehension,
        ast.GeneratorExp: _comprehension,
        ast.NamedExpr: _named,
        ast.Lambda: _lambda,
    }


def _plain_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_plain, value))
