"""Reads a package's sources without importing it: where a name is defined, what its signature and its inside are.

Works on any unpacked version of vLLM in about a second, since nothing is executed.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Missing(LookupError):
    """A name that the sources do not define."""


@dataclass(frozen=True)
class Definition:
    """A class, a function, an attribute or a module's variable, where it is defined."""

    module: str
    node: ast.AST

    @property
    def signature(self) -> str:
        """Of a function its parameters and whether it is a coroutine's; of a class that of its `__init__`, if it
        defines one; of what is assigned, its type and value; of a module ""."""
        if isinstance(self.node, ast.ClassDef):
            own = [n for n in self.node.body if isinstance(n, Function) and n.name == "__init__"]
            return Definition(self.module, own[0]).signature if own else ""
        if isinstance(self.node, ast.Assign | ast.AnnAssign):
            return _type_of(self.node)
        if not isinstance(self.node, Function):
            return ""
        kind = "async " if isinstance(self.node, ast.AsyncFunctionDef) else ""
        return f"{kind}({_without_types(self.node.args)})"

    @property
    def digest(self) -> str:
        """Of the source, without comments, docstrings and layout."""
        return hashlib.sha256(ast.dump(_without_docstrings(self.node)).encode()).hexdigest()[:16]


class Sources:
    """Of one package."""

    def __init__(self, package: str, folder: Path | None = None) -> None:
        """`folder` holds the package's modules; None: those of the installed package."""
        self.package = package
        self.folder = folder or _installed(package)
        self._trees: dict[str, ast.Module] = {}

    def find(self, path: str) -> Definition:
        """What `package.module.Class.attribute` names, through imports and base classes. Raises: Missing."""
        module, names = self._split(path)
        if not names:
            return Definition(module, self._tree(module))
        found = self._in_module(module, names[0])
        for name in names[1:]:
            found = self._attribute(found, name)
        return found

    def has(self, path: str) -> bool:
        try:
            self.find(path)
        except Missing:
            return False
        return True

    def _split(self, path: str) -> tuple[str, list[str]]:
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            if self._file(".".join(parts[:count])) is not None:
                return ".".join(parts[:count]), parts[count:]
        raise Missing(f"there is no {path}")

    def _in_module(self, module: str, name: str) -> Definition:
        for node in _statements(self._tree(module).body):
            if isinstance(node, (*_DEFINES, ast.ClassDef)) and node.name == name:
                return Definition(module, node)
            if name in _assigned(node):
                return Definition(module, node)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(f"{self._base(module, node)}.{alias.name}")
        for star in self._stars(module):
            if name in _top_level(self._tree(star)):
                return self._in_module(star, name)
        raise Missing(f"{module} defines no {name}")

    def _stars(self, module: str) -> list[str]:
        """The package's modules that a module imports all names of."""
        nodes = [node for node in self._tree(module).body if isinstance(node, ast.ImportFrom)]
        bases = [self._base(module, node) for node in nodes if node.names[0].name == "*"]
        return [base for base in bases if self._file(base) is not None]

    def _attribute(self, owner: Definition, name: str) -> Definition:
        if not isinstance(owner.node, ast.ClassDef):
            raise Missing(f"{owner.module}: {ast.dump(owner.node)[:60]} is no class with {name}")
        for cls in self._ancestors(owner):
            assert isinstance(cls.node, ast.ClassDef)
            for node in _statements(cls.node.body):
                if (isinstance(node, _DEFINES) and node.name == name) or name in _assigned(node):
                    return Definition(cls.module, node)
            if (assignment := _attributes(cls.node).get(name)) is not None:
                return Definition(cls.module, assignment)
        if (beside := _attributes(self._tree(owner.module)).get(name)) is not None:  # functions beside it may set it
            return Definition(owner.module, beside)
        raise Missing(f"{owner.node.name} of {owner.module} has no {name}")

    def _ancestors(self, owner: Definition) -> Iterator[Definition]:
        """The class and its base classes within the package, nearest first."""
        yield owner
        assert isinstance(owner.node, ast.ClassDef)
        for base in owner.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                try:
                    found = self._in_module(owner.module, base.id)
                except Missing:
                    continue  # of another package
                if isinstance(found.node, ast.ClassDef):
                    yield from self._ancestors(found)

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file = self._file(module)
        parts = module.split(".")
        parts = parts if file is not None and file.name == "__init__.py" else parts[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _file(self, module: str) -> Path | None:
        first, *rest = module.split(".")
        if first != self.package:
            return None
        stem = self.folder.joinpath(*rest)
        files = (stem / "__init__.py", stem.with_suffix(".py")) if rest else (stem / "__init__.py",)
        return next((file for file in files if file.is_file()), None)

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            file = self._file(module)
            if file is None:
                raise Missing(f"there is no module {module}")
            self._trees[module] = ast.parse(file.read_text())
        return self._trees[module]


_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef)


def _installed(package: str) -> Path:
    spec = find_spec(package)  # finds a top-level package without importing it
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """With those that stand under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _top_level(tree: ast.Module) -> set[str]:
    """Names that a module defines itself."""
    found = {node.name for node in tree.body if isinstance(node, (*_DEFINES, ast.ClassDef))}
    return found.union(*(_assigned(node) for node in tree.body))


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [one for target in node.targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _assigned(node: ast.AST) -> set[str]:
    return {target.id for target in _targets(node) if isinstance(target, ast.Name)}


@cache
def _attributes(tree: ast.AST) -> dict[str, ast.AST]:
    """What is assigned to attributes of anything, by the attribute's name: the first assignment."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer":
            found.setdefault(str(getattr(node.args[0], "value", "")), node)
        for target in _targets(node):
            if isinstance(target, ast.Attribute):
                found.setdefault(target.attr, node)
    return found


def _type_of(node: ast.Assign | ast.AnnAssign) -> str:
    """What an assignment says of a type: the annotation, or what is called to make the value, or the value."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation)
    return f"{ast.unparse(node.value.func)}(...)" if isinstance(node.value, ast.Call) else ast.unparse(node.value)


def _without_types(arguments: ast.arguments) -> str:
    bare = ast.parse(f"def f({ast.unparse(arguments)}): ...").body[0]
    assert isinstance(bare, ast.FunctionDef)
    for argument in ast.walk(bare.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(bare.args)


def _without_docstrings(node: ast.AST) -> ast.AST:
    copy = ast.parse(ast.unparse(node))
    for inner in ast.walk(copy):
        if isinstance(inner, (*_DEFINES, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return copy
