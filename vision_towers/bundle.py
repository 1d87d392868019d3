"""Write modules of this package as one file.

A checkpoint with remote code has to bring its classes in a single file: from several, transformers imports a
configuration class twice, as two classes that do not know each other. The file is cut together from the modules
themselves, so there is no second copy of the code that could drift from the first.
"""

import ast
import builtins
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec, resolve_name
from pathlib import Path

from .errors import UserError

PACKAGE = __name__.partition(".")[0]
ROOT = "__root__"  # the module that the bundle is of
LINE = 120
LARGE = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class _External:
    """What an import from outside the package binds: `import module`, or `from module import name`."""

    module: str
    name: str | None
    bound: str


@dataclass(frozen=True)
class _Internal:
    """`from module import name`, of a module in the package."""

    module: str
    name: str


@dataclass(frozen=True)
class _Definition:
    """The top-level statement of a module, by its number, that binds a name."""

    module: str
    number: int


_Binding = _External | _Internal | _Definition
_Origin = _External | _Definition | None  # None: a builtin, or a local variable


@dataclass
class _Module:
    """A parsed module: its statements without imports, and what its top level binds."""

    source: str
    doc: str | None
    quoted: bool  # its annotations are never evaluated
    statements: list[ast.stmt] = field(default_factory=list)
    bound: dict[str, _Binding] = field(default_factory=dict)


def bundle(source: str) -> str:
    """`source` with everything it imports from this package written out above it; it needs no package afterwards.

    Of each module only the statements that are needed are taken, with their comments, in the order of the imports.
    Statements that are calls (registrations) come with the first thing taken from their module.

    Args:
        source: a module. Its imports from this package are absolute.
    Raises:
        UserError: two modules use one name for different things, or a module does what cannot be cut out of it.
    """
    return _Bundler(source).text()


class _Bundler:
    def __init__(self, source: str):
        self.modules = {ROOT: _parse(ROOT, source)}
        self.kept: dict[str, set[int]] = {}
        self.uses: dict[str, dict[str, None]] = {}  # module -> modules it needs, in order
        self.owners: dict[str, _Origin] = {}
        for number in range(len(self.modules[ROOT].statements)):
            self._keep(_Definition(ROOT, number))

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            spec = find_spec(name)
            if spec is None or spec.origin is None:
                raise UserError(f"{name} cannot be bundled: it is no module of this installation.")
            self.modules[name] = _parse(name, Path(spec.origin).read_text(encoding="utf-8"))
        return self.modules[name]

    def _origin(self, module: str, name: str) -> _Origin:
        """Where a name that a module's code uses comes from, through any number of imports."""
        found = self._module(module).bound.get(name)
        return self._origin(found.module, found.name) if isinstance(found, _Internal) else found

    def _keep(self, definition: _Definition) -> None:
        """Take a statement and all that it needs."""
        module, kept = self._module(definition.module), self.kept.setdefault(definition.module, set())
        if definition.number in kept:
            return
        first_taken = not kept
        kept.add(definition.number)
        if first_taken:
            for number, statement in enumerate(module.statements):
                if isinstance(statement, ast.Expr):
                    self._keep(_Definition(definition.module, number))
        node = module.statements[definition.number]
        _check_imports(definition.module, node)
        for name in _names_bound(node):
            self._claim(name, definition)
        for name in _names_used(node):
            origin = self._origin(definition.module, name)
            if isinstance(origin, _External):
                self._claim(origin.bound, origin)
            elif origin is not None:
                origin = self._same_before(name, origin)
                if origin.module != definition.module:
                    self.uses.setdefault(definition.module, {})[origin.module] = None
                self._keep(origin)
            elif isinstance(module.bound.get(name), _Internal):
                raise UserError(f"{definition.module} cannot be bundled: nothing defines the {name} it imports.")
            elif hasattr(builtins, name):
                self._claim(name, None)

    def _same_before(self, name: str, found: _Definition) -> _Definition:
        """A statement taken earlier from another module when it reads the same: one of the two is enough."""
        earlier = self.owners.get(name)
        if not isinstance(earlier, _Definition):
            return found
        both = (self._module(place.module).statements[place.number] for place in (earlier, found))
        return earlier if len({ast.dump(node) for node in both}) == 1 else found

    def _claim(self, name: str, origin: _Origin) -> None:
        if self.owners.setdefault(name, origin) != origin:
            places = " and ".join(place.module if place else "Python" for place in (self.owners[name], origin))
            raise UserError(f"the name {name} stands for two things in one file, those of {places}; rename one.")

    def text(self) -> str:
        parts = [_imports(origin for origin in self.owners.values() if isinstance(origin, _External))]
        for name in self._order():
            module = self.modules[name]
            if name != ROOT:
                title = f"# {'-' * 8} {name} {'-' * max(0, 100 - len(name))}"
                parts.append("\n".join([title, *(f"# {line}".rstrip() for line in (module.doc or "").splitlines())]))
            parts.append(_statements(module, sorted(self.kept[name])))
        head = self.modules[ROOT].doc
        return "\n\n".join([f'"""{head}"""', *parts] if head else parts) + "\n"

    def _order(self) -> list[str]:
        """Each module after those it needs."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in order:
                for needed in self.uses.get(name, ()):
                    visit(needed)
                order[name] = None

        visit(ROOT)
        return list(order)


def _parse(name: str, source: str) -> _Module:
    tree = ast.parse(source)
    module = _Module(source, ast.get_docstring(tree), quoted=False)
    for node in tree.body[1 if module.doc is not None else 0 :]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imports = node.body
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imports = [node]
        else:
            imports = []
            if not isinstance(node, LARGE | ast.Assign | ast.AnnAssign | ast.Expr):
                raise UserError(f"{name} cannot be bundled: line {node.lineno} is no definition, assignment or call.")
            for bound in _names_bound(node):
                module.bound[bound] = _Definition(name, len(module.statements))
            module.statements.append(node)
        for node in imports:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                module.quoted = True
            else:
                module.bound |= _read_import(name, node)
    return module


def _read_import(name: str, node: ast.stmt) -> dict[str, _Binding]:
    if isinstance(node, ast.Import):
        if any(alias.asname is None and "." in alias.name for alias in node.names):
            raise UserError(f"{name} cannot be bundled: it imports a module by a dotted name.")
        return {(a.asname or a.name): _External(a.name, None, a.asname or a.name) for a in node.names}
    assert isinstance(node, ast.ImportFrom)
    source = node.module or ""
    if node.level:
        spec = find_spec(name)
        is_package = spec is not None and spec.submodule_search_locations is not None
        source = resolve_name("." * node.level + source, name if is_package else name.rpartition(".")[0])
    if source.partition(".")[0] != PACKAGE:
        return {(a.asname or a.name): _External(source, a.name, a.asname or a.name) for a in node.names}
    if any(alias.asname for alias in node.names):
        raise UserError(f"{name} cannot be bundled: it imports from {source} under another name.")
    return {alias.name: _Internal(source, alias.name) for alias in node.names}


def _check_imports(name: str, node: ast.stmt) -> None:
    """Raises UserError for a statement that needs the package when it runs."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and (inner.level or (inner.module or "").partition(".")[0] == PACKAGE):
            where = f"line {inner.lineno} imports from this package inside a function"
            raise UserError(f"{name} cannot be bundled: {where}.")


def _names_bound(node: ast.stmt) -> list[str]:
    if isinstance(node, LARGE):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _names_used(node: ast.AST) -> list[str]:
    # Names of local variables come along; that one of them has a definition taken which is not needed does no harm.
    return list(dict.fromkeys(part.id for part in ast.walk(node) if isinstance(part, ast.Name)))


def _imports(origins: Iterable[_External]) -> str:
    """Import statements, those of the standard library first."""
    whole: set[str] = set()
    parts: dict[str, set[str]] = {}
    for origin in origins:
        if origin.name is None:
            whole.add(origin.module if origin.bound == origin.module else f"{origin.module} as {origin.bound}")
        else:
            renamed = origin.name if origin.bound == origin.name else f"{origin.name} as {origin.bound}"
            parts.setdefault(origin.module, set()).add(renamed)
    lines = [f"import {module}" for module in sorted(whole)]
    for module, names in sorted(parts.items()):
        line = f"from {module} import {', '.join(sorted(names))}"
        long = "".join(f"    {name},\n" for name in sorted(names))
        lines.append(line if len(line) <= LINE else f"from {module} import (\n{long})")
    lines.sort(key=lambda line: line.split()[1].partition(".")[0] not in sys.stdlib_module_names)
    return "\n".join(lines)


def _statements(module: _Module, numbers: list[int]) -> str:
    """The statements as they stand in the file, each with the comment above it."""
    lines = module.source.splitlines()
    text, before = "", None
    for node in (module.statements[number] for number in numbers):
        decorators = getattr(node, "decorator_list", [])
        first = min(part.lineno for part in (node, *decorators)) - 1
        body = lines[first : node.end_lineno]
        if module.quoted:
            body = _quote_annotations(node, body, first + 1)
        while first and lines[first - 1].startswith("#"):
            first -= 1
            body.insert(0, lines[first])
        if before is not None:
            text += "\n\n\n" if isinstance(node, LARGE) or isinstance(before, LARGE) else "\n"
        text, before = text + "\n".join(body), node
    return text


def _quote_annotations(node: ast.stmt, lines: list[str], first: int) -> list[str]:
    """Each annotation as a string, which is what `from __future__ import annotations` makes of it.

    Args:
        lines: of the statement. first: number of its first line.
    """
    found: list[ast.expr] = []
    for part in ast.walk(node):
        note = part.returns if isinstance(part, ast.FunctionDef) else getattr(part, "annotation", None)
        if note is not None:
            found.append(note)
    lines = list(lines)
    for note in sorted(found, key=lambda part: (part.lineno, part.col_offset), reverse=True):
        assert note.end_lineno is not None
        begin, end = note.lineno - first, note.end_lineno - first
        head, tail = lines[begin].encode()[: note.col_offset], lines[end].encode()[note.end_col_offset :]  # in bytes
        lines[begin : end + 1] = [f"{head.decode()}{json.dumps(ast.unparse(note), ensure_ascii=False)}{tail.decode()}"]
    return lines
