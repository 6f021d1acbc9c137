"""Hash the code that makes an encoded set, so that a cached set is reused only for the same code.

alignkit's own code is known by one digest of its source files. Of a user's reader or encoder the
code itself is looked at, with whatever it captures, refers to and inherits, so that two functions
of one name, or one function before and after an edit, are never taken for each other.
"""

from __future__ import annotations

import builtins
import copyreg
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import xxhash

import alignkit
from alignkit.data.read.hashes import file_hash

_HOME = Path(alignkit.__file__).parent
# What makes and reads token ids; the rest of the package has no part in them.
_FOLDERS = ("data", "data/encode", "data/keep", "data/read", "data/text")
_FILES = ("batch.py", "models/load.py", "models/text_format.py", "models/tokenizer.py")
_LARGEST = 2**20  # of these files, in bytes
# What says nothing about what a class does, or differs between two runs all the same.
_BOOKKEEPING = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__qualname__"),
    *("__firstlineno__", "__static_attributes__", "__annotations_cache__", "__annotate_func__"),
    *("__abstractmethods__", "_abc_impl", "__orig_bases__", "__parameters__", "__slotnames__"),
}


class UnknownContentError(Exception):
    """Report an object whose content cannot be hashed, so that nothing may be cached by it."""


def _package_digest() -> str:
    """Hash the sources that make token ids; without source files, give the version."""
    digest = xxhash.xxh3_128()
    paths = _sources()
    for path in paths:  # every import waits for this: open() would take three times as long
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        digest.update(os.path.basename(path).encode() + os.read(handle, _LARGEST))
        os.close(handle)
    return digest.hexdigest() if paths else f"version {alignkit.__version__}"


def _sources() -> list[str]:
    """Return the paths of the sources that make token ids, none in a zip archive."""
    if not os.path.isdir(_HOME):
        return []
    paths = [os.path.join(_HOME, name) for name in _FILES]
    for folder in _FOLDERS:
        with os.scandir(os.path.join(_HOME, folder)) as inside:
            paths += sorted(each.path for each in inside if each.name.endswith(".py"))
    return paths


PACKAGE_DIGEST = _package_digest()
"""What alignkit's own code is, hashed as it is imported: a later edit does not change what runs."""


def code_identity(*things: Any) -> str:
    """Hash functions, classes or objects by what they are made of.

    Args:
        *things: alignkit's own are known by their names, since `PACKAGE_DIGEST` covers them;
            what they capture counts all the same.

    Raises:
        UnknownContentError: A captured value cannot be taken apart (an open file, a lock).
    """
    content = _Content()
    for thing in things:
        content.add(thing)
    return content.digest.hexdigest()


def is_own(function: Callable[..., Any]) -> bool:
    """Tell whether a function or class is alignkit's, whatever names it goes by."""
    if isinstance(function, FunctionType):  # `functools.wraps` changes its module's name
        return Path(function.__code__.co_filename).is_relative_to(_HOME)
    return _own_name(getattr(function, "__module__", None))


def _own_name(module: object) -> bool:
    return str(module or "").partition(".")[0] == alignkit.__name__


class _Content:
    """Hash objects by walking through what they consist of."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        # Kept alive, so that no other object takes over an id: what __reduce_ex__ makes is new.
        self._met: dict[int, tuple[int, Any]] = {}
        self._modules: set[tuple[str, frozenset[str]]] = set()

    def add(self, thing: Any) -> None:
        """Add one object to the hash, with all it refers to.

        Raises:
            UnknownContentError: It, or a part of it, cannot be taken apart.
        """
        if thing is None or type(thing) in (bool, int, float, complex, str, bytes):
            self._tell(type(thing).__name__, repr(thing))
        elif type(thing) in (tuple, CodeType):  # shared or not, as the compiler pleases
            self._add_new(thing)
        elif id(thing) in self._met:
            self._tell("again", str(self._met[id(thing)][0]))
        else:
            self._met[id(thing)] = len(self._met), thing
            self._add_new(thing)

    def _tell(self, *words: str) -> None:
        for word in words:
            data = word.encode("utf-8", "surrogatepass")
            self.digest.update(len(data).to_bytes(8, "little") + data)

    def _add_all(self, kind: str, things: Iterable[Any]) -> None:
        listed = list(things)
        self._tell(kind, str(len(listed)))
        for thing in listed:
            self.add(thing)

    def _add_new(self, thing: Any) -> None:
        if isinstance(thing, FunctionType):
            self._add_function(thing)
        elif isinstance(thing, CodeType):
            self._add_code(thing)
        elif isinstance(thing, type):
            self._add_class(thing)
        elif isinstance(thing, ModuleType):
            self._add_module(thing, frozenset())
        elif isinstance(thing, MethodType):
            self._add_all("method", (thing.__func__, thing.__self__))
        elif isinstance(thing, BuiltinFunctionType):
            self._add_all(f"builtin {thing.__qualname__}", [getattr(thing, "__self__", None)])
        elif isinstance(thing, partial):
            self._add_all("partial", (thing.func, thing.args, thing.keywords))
        elif isinstance(thing, staticmethod | classmethod):
            self._add_all(type(thing).__name__, [thing.__func__])
        elif isinstance(thing, property):
            self._add_all("property", (thing.fget, thing.fset, thing.fdel))
        elif type(thing) in (tuple, list):
            self._add_all(type(thing).__name__, thing)
        elif type(thing) is dict:
            self._add_all("dict", (part for item in thing.items() for part in item))
        elif type(thing) in (set, frozenset):
            self._add_all("set", sorted(code_identity(each) for each in thing))
        else:
            self._add_object(thing)

    def _add_function(self, function: FunctionType) -> None:
        code = function.__code__
        self._tell("function", function.__module__ or "", code.co_name)
        captured = [_cell(cell) for cell in function.__closure__ or ()]
        self._add_all("with", (function.__defaults__, function.__kwdefaults__, *captured))
        if is_own(function):
            return
        if _installed(code.co_filename):
            self._add_module(sys.modules.get(function.__module__), frozenset())
            return
        self.add(code)
        self.add(vars(function))
        names = frozenset(_names(code))
        for name in sorted(names & set(function.__globals__)):
            self._tell("global", name)
            value = function.__globals__[name]
            self._add_module(value, names) if isinstance(value, ModuleType) else self.add(value)

    def _add_code(self, code: CodeType) -> None:
        self._tell("code", code.co_code.hex(), code.co_name)
        for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_consts):
            self._add_all("names", names)

    def _add_class(self, cls: type) -> None:
        self._tell("class", cls.__module__, cls.__qualname__)
        module = sys.modules.get(cls.__module__)
        if _own_name(cls.__module__) or module is builtins:
            return
        if _installed(getattr(module, "__file__", None)):
            self._add_module(module, frozenset())
            return
        self._add_all("bases", cls.__bases__)
        for name, value in sorted(vars(cls).items()):
            if name not in _BOOKKEEPING:
                self._tell("attribute", name)
                self.add(value)

    def _add_module(self, module: ModuleType | None, names: frozenset[str]) -> None:
        """Add a module by its source; a user's own also by what ``names`` refer to in it."""
        name = module.__name__ if module else ""
        self._tell("module", name)
        file = getattr(module, "__file__", None)
        seen = (name, names) in self._modules
        if module is None or seen or _own_name(name) or _standard(name):
            return
        self._modules.add((name, names))
        if file:
            try:
                self._tell(file_hash(Path(file)))
            except OSError as error:
                raise UnknownContentError(f"the source of {name} cannot be read") from error
        if not _installed(file):
            for attribute in sorted(names & set(vars(module))):
                value = vars(module)[attribute]
                self._tell("attribute", attribute)
                self._add_module(value, names) if isinstance(value, ModuleType) else self.add(value)

    def _add_object(self, thing: Any) -> None:
        kind = type(thing)
        self.add(kind)
        if _own_name(kind.__module__) and hasattr(kind, "fingerprint"):
            self.add(thing.fingerprint)
            return
        reduce = copyreg.dispatch_table.get(kind)
        try:
            parts = reduce(thing) if reduce else thing.__reduce_ex__(4)
        except Exception as error:  # a class may raise what it likes
            raise UnknownContentError(f"a {kind.__qualname__} cannot be taken apart") from error
        if isinstance(parts, str):
            self._tell("named", parts)
            return
        function, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        self._add_all("object", (function, arguments, state, list(items or ()), list(pairs or ())))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> set[str]:
    """Return the names that a function's code may look up, with those of inner functions."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"


def _installed(file: str | None) -> bool:
    """Tell whether a file came with Python or a package, so that hashing the file is enough."""
    path = file or ""
    parts = path.split(os.sep)
    packages = "site-packages" in parts or "dist-packages" in parts
    return packages or path.startswith(("<frozen", sysconfig.get_paths()["stdlib"] + os.sep))
