"""One module of the package as text: its top-level statements, what each defines, and which names it refers to.

Text is changed by position, so that comments and layout stay as they were written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[1]
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


class Edit(NamedTuple):
    """Bytes ``start`` to ``end`` of the module become ``text``."""

    start: int
    end: int
    text: str


class Place(NamedTuple):
    """Where an imported name comes from: ``name`` of ``module``; without a module, ``name`` is one itself."""

    module: str
    name: str

    @property
    def ours(self) -> bool:
        return self.module.split(".")[0] == "hybridlm"


@dataclass(frozen=True)
class Statement:
    """Bytes ``start`` to ``end`` of the module, with the comments above. defines: names; refers: where which global
    name is meant, in the order of the text; cuts: parts that are left out or replaced, and refer to nothing."""

    start: int
    end: int
    defines: frozenset[str]
    refers: tuple[Edit, ...]
    cuts: tuple[Edit, ...]


class Source:
    """The module ``name``. left_out: methods that are cut out of its classes; instead: what takes the place of a
    function's own import from the package and of all that follows it in its block."""

    def __init__(self, name: str, left_out: frozenset[str], instead: str) -> None:
        self.name, self._left_out, self._instead = name, left_out, instead
        self.bytes = _ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py").read_bytes()
        self.tree = ast.parse(self.bytes, name)
        self.imports: dict[str, Place] = {}  # at run time
        self.typing: dict[str, Place] = {}  # under TYPE_CHECKING
        self._lines = [0]
        for line in self.bytes.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self.statements = tuple(self._read())

    @cached_property
    def own(self) -> frozenset[str]:
        """The names that the module defines."""
        return frozenset(name for statement in self.statements for name in statement.defines)

    @property
    def title(self) -> str:
        """The module's docstring."""
        return ast.get_docstring(self.tree) or ""

    def at(self, line: int, column: int) -> int:
        """The byte of a position in the tree."""
        return self._lines[line - 1] + column

    def text(self, statement: Statement, edits: list[Edit]) -> str:
        """The statement with its cuts and these edits applied."""
        pieces, at = [], statement.start
        for edit in sorted([*statement.cuts, *edits]):
            pieces += [self.bytes[at : edit.start].decode(), edit.text]
            at = edit.end
        return "".join([*pieces, self.bytes[at : statement.end].decode()]).rstrip("\n")

    def home(self, statement: Statement) -> frozenset[str]:
        """The names with which a statement comes: a registration such as ``differentiate(operator, backward)`` defines
        nothing, and comes with the first of the module's own that it refers to. RuntimeError: there is none."""
        if defined := statement.defines - {"_"}:
            return defined
        if first := next((refer.text for refer in statement.refers if refer.text in self.own), None):
            return frozenset({first})
        raise RuntimeError(f"{self.name}: a statement that belongs to nothing: {self.text(statement, []).strip()[:80]}")

    def _read(self) -> Iterator[Statement]:
        end = 0
        for node in self.tree.body:
            start, end = end, self._lines[node.end_lineno or node.lineno]
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= _imported(node)
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                for inner in node.body:
                    assert isinstance(inner, ast.Import | ast.ImportFrom), f"{self.name}: {ast.unparse(inner)}"
                    self.typing |= _imported(inner)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                yield self._statement(node, start, end)

    def _statement(self, node: ast.stmt, start: int, end: int) -> Statement:
        cuts = list(self._cut_methods(node))
        cuts += [edit for edit in self._cut_imports(node) if not any(cut.start <= edit.start < cut.end for cut in cuts)]
        names = _Globals()
        names.visit(node)
        found = [
            Edit(place := self.at(name.lineno, name.col_offset), place + len(name.id.encode()), name.id)
            for name in names.found
        ]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            word = self.bytes.index(node.name.encode(), self.at(node.lineno, node.col_offset) + len("def"))
            found.append(Edit(word, word + len(node.name.encode()), node.name))
        refers = sorted(one for one in found if not any(cut.start <= one.start < cut.end for cut in cuts))
        return Statement(start, end, frozenset(_defined(node)), tuple(refers), tuple(cuts))

    def _cut_methods(self, node: ast.stmt) -> Iterator[Edit]:
        before = node
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(inner, ast.FunctionDef) and inner.name in self._left_out:
                first = before.lineno if before is node else (before.end_lineno or before.lineno)
                yield Edit(self._lines[first], self._lines[inner.end_lineno or inner.lineno], "")
            before = inner

    def _cut_imports(self, node: ast.stmt) -> Iterator[Edit]:
        for outer in ast.walk(node):
            for name in ("body", "orelse"):
                block = getattr(outer, name, None)
                for inner in block if isinstance(block, list) else []:
                    if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("hybridlm"):
                        last: ast.stmt = block[-1]  # type: ignore[index]
                        end = self.at(last.end_lineno or 0, last.end_col_offset or 0)
                        yield Edit(self.at(inner.lineno, inner.col_offset), end, self._instead)
                        break

    @cached_property
    def strings(self) -> list[Edit]:
        """Every text constant: where it stands, and its value."""
        return [
            Edit(self.at(node.lineno, node.col_offset), self.at(node.end_lineno or 0, node.end_col_offset or 0), value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Constant) and isinstance(value := node.value, str)
        ]


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, Place]:
    """What an import statement binds. ``import a.b as c`` and ``from a import b as c`` are one."""
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: Place(node.module or "", alias.name) for alias in node.names}
    found = {}
    for alias in node.names:
        module, _, name = alias.name.rpartition(".")
        assert alias.asname or not module, f"import {alias.name}"
        found[alias.asname or name] = Place(module, name)
    return found


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name))


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
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        if isinstance(node, _Comprehension):  # only an assignment expression binds a name around it
            walrus = [inner.target for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)]
            yield from (target.id for target in walrus)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from _bound(list(ast.iter_child_nodes(node)))
