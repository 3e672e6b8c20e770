"""One module of the package as text: its top-level statements, what each defines, and which names it refers to.

Text is changed by position, so that comments and layout stay as they were written.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

LEFT_OUT = frozenset({"balance", "flops", "kernel_needs", "metrics", "narrowed", "prepare", "state_bytes"})
OPERATORS = "hybridlm::"  # the namespace of the package's operators
_NO_KERNELS = 'raise NotImplementedError("compiled kernels are part of hybridlm, not of this file")'
_ROOT = Path(__file__).parents[1]
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class Edit(NamedTuple):
    """Bytes ``start`` to ``end`` of a text become ``text``."""

    start: int
    end: int
    text: str


class Place(NamedTuple):
    """Where a name comes from: ``name`` of ``module``; without a module, ``name`` is one itself."""

    module: str
    name: str

    @property
    def ours(self) -> bool:
        return self.module.split(".")[0] == "hybridlm"


@dataclass(frozen=True)
class Statement:
    """text: with the comments above it. defines: names. refers: where in the text which global name is meant, in
    order."""

    text: bytes
    defines: frozenset[str]
    refers: tuple[Edit, ...]


class Source:
    """The module ``name`` without what stays behind: methods that only the package calls (``LEFT_OUT``), and compiled
    kernels, which a function imports where it calls them. Its operators get the namespace ``_OPERATORS``. title: its
    docstring. imports: what names mean that it imports; typing: those under TYPE_CHECKING."""

    def __init__(self, name: str) -> None:
        self.name, self.imports, self.typing = name, dict[str, Place](), dict[str, Place]()
        text = _ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py").read_bytes()
        text = edited(text, _Tree(text).left_behind())
        tree, lines = ast.parse(text), text.splitlines(keepends=True)
        self.title = ast.get_docstring(tree) or ""
        self.statements: list[Statement] = []
        end = 0
        for node in tree.body:
            start, end = end, node.end_lineno or 0
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= _imported(node)
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                self.typing |= {name: place for inner in node.body for name, place in _imported(inner).items()}
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                self.statements.append(_statement(b"".join(lines[start:end])))
        self.own = frozenset(name for statement in self.statements for name in statement.defines)

    def home(self, statement: Statement) -> frozenset[str]:
        """The names with which a statement comes: a registration such as ``differentiate(operator, backward)`` defines
        nothing, and comes with the first of the module's own that it refers to. RuntimeError: there is none."""
        if defined := statement.defines - {"_"}:
            return defined
        if first := next((refer.text for refer in statement.refers if refer.text in self.own), None):
            return frozenset({first})
        raise RuntimeError(f"{self.name}: a statement that belongs to nothing: {statement.text.decode().strip()[:80]}")


def edited(text: bytes, edits: Iterable[Edit]) -> bytes:
    """Edits inside the bytes of another are dropped."""
    pieces, at = list[bytes](), 0
    for edit in sorted(edits):
        if edit.start >= at:
            pieces += [text[at : edit.start], edit.text.encode()]
            at = edit.end
    return b"".join([*pieces, text[at:]])


class _Tree:
    """A text parsed, and where in it the nodes stand."""

    def __init__(self, text: bytes) -> None:
        self.root = ast.parse(text)
        self._lines = [0, *accumulate(len(line) for line in text.splitlines(keepends=True))]

    def span(self, first: ast.expr | ast.stmt, last: ast.expr | ast.stmt, text: str) -> Edit:
        """From the start of one node to the end of another."""
        end = self._lines[(last.end_lineno or 0) - 1] + (last.end_col_offset or 0)
        return Edit(self._lines[first.lineno - 1] + first.col_offset, end, text)

    def left_behind(self) -> Iterator[Edit]:
        """What no file gets, see ``Source``: a method goes with the comments above it."""
        for node in ast.walk(self.root):
            if isinstance(node, ast.ClassDef):
                for before, inner in pairwise(node.body):
                    if isinstance(inner, ast.FunctionDef) and inner.name in LEFT_OUT:
                        yield Edit(self._lines[before.end_lineno or 0], self._lines[inner.end_lineno or 0], "")
            elif isinstance(node, ast.FunctionDef):
                yield from self._kernels(node)
            elif isinstance(node, ast.Constant) and str(node.value).startswith(OPERATORS):
                yield self.span(node, node, f'f"{{_OPERATORS}}::{str(node.value).removeprefix(OPERATORS)}"')

    def _kernels(self, function: ast.FunctionDef) -> Iterator[Edit]:
        """An import goes with all that follows it in its block."""
        for outer in ast.walk(function):
            blocks = [getattr(outer, name, None) for name in ("body", "orelse")]
            for block in (block for block in blocks if isinstance(block, list)):
                for inner in block:
                    if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("hybridlm"):
                        yield self.span(inner, block[-1], _NO_KERNELS)


def _statement(text: bytes) -> Statement:
    tree, names = _Tree(text), _Globals()
    names.visit(tree.root)
    refers = [tree.span(name, name, name.id) for name in names.found]
    defines = [name.id for name in names.found if isinstance(name.ctx, ast.Store)]
    if named := re.search(rb"^(?:def|class) (\w+)", text, re.MULTILINE):
        defines.append(named[1].decode())
        refers.append(Edit(*named.span(1), defines[-1]))
    return Statement(text, frozenset(defines), tuple(sorted(refers)))


def _imported(node: ast.stmt) -> dict[str, Place]:
    """What an import statement binds. ``import a.b as c`` and ``from a import b as c`` are one."""
    assert isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: Place(node.module or "", alias.name) for alias in node.names}
    found = {}
    for alias in node.names:
        module, _, name = alias.name.rpartition(".")
        assert alias.asname or not module, f"import {alias.name}"
        found[alias.asname or name] = Place(module, name)
    return found


class _Globals(ast.NodeVisitor):
    """Finds the names that mean something of the module: those that no scope around them binds."""

    def __init__(self) -> None:
        self.found: list[ast.Name] = []
        self._scopes: list[set[str]] = []

    def visit_Name(self, node: ast.Name) -> None:
        if not any(node.id in names for names in self._scopes):
            self.found.append(node)

    def _visit_function(self, node: _Function) -> None:
        arguments = [one for one in ast.walk(node.args) if isinstance(one, ast.arg)]
        body = node.body if isinstance(node.body, list) else [node.body]
        inside = {id(one) for one in body}
        for child in ast.iter_child_nodes(node):  # decorators, defaults and annotations belong to the scope around it
            if id(child) not in inside:
                self.visit(child)
        self._within({one.arg for one in arguments} | set(_bound(body)), body)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """What a class binds is seen in its body, not in its methods."""
        for child in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(child)
        names = set(_bound(node.body))
        for inner in node.body:
            if isinstance(inner, _Function):
                self.visit(inner)
            else:
                self._within(names, [inner])

    def _visit_comprehension(self, node: _Comprehension) -> None:
        targets = [inner for one in node.generators for inner in ast.walk(one.target)]
        self._within({one.id for one in targets if isinstance(one, ast.Name)}, list(ast.iter_child_nodes(node)))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def _within(self, names: set[str], nodes: list[ast.AST] | list[ast.stmt] | list[ast.expr]) -> None:
        self._scopes.append(names)
        for node in nodes:
            self.visit(node)
        self._scopes.pop()


def _bound(nodes: list[ast.AST] | list[ast.stmt] | list[ast.expr]) -> Iterator[str]:
    """The names that these nodes bind in their own scope."""
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(name := getattr(node, "name", None), str):  # a function, a class, an exception, a pattern
            yield name
        if isinstance(node, _Comprehension):  # only an assignment expression binds a name around it
            walrus = [inner.target for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]
            yield from (target.id for target in walrus)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _bound(list(ast.iter_child_nodes(node)))
