"""Those that are measured: their names on the command line, and where the code that calls each of them is.

Only the process that measures a contender imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.contenders.base import Contender
from bench.layers import CONV, FILTER_GRADIENT, TRANSPOSE

# What stands in place of an algorithm for a filter that is prepared before.
PREPARED = "prepared"
PEERS = ("torch", "tensorflow", "onnxruntime", "openvino", "jax")
# What each needs to be installed. The two engines are given an ONNX model.
NEEDS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "jax": ("jax",),
}
# Operations that a kind of contender has not: ONNX has no operator for the filter's gradient.
LACKS = {"onnxruntime": (FILTER_GRADIENT,), "openvino": (FILTER_GRADIENT,), "library": (CONV, FILTER_GRADIENT)}
LIBRARY_SUFFIXES = (".so", ".dylib", ".dll")
FORMS = (
    "gemmconv, gemmconv:ALGORITHM, gemmconv:prepared, numpy, "
    + ", ".join(PEERS)
    + ", module:function, file.py:function, lib.so:symbol, gemmconv@DIRECTORY or gemmconv@DIRECTORY:ALGORITHM "
    "of another checkout or a virtual environment"
)


@dataclass(frozen=True)
class Spec:
    """A contender as it was asked for; `kind` chooses the code, `name` is what tables show.

    `where` is its file or module; of gemmconv the directory of another checkout or of a virtual environment, or empty.
    """

    text: str
    kind: str
    where: str
    what: str
    name: str

    @property
    def python(self) -> str:
        """The interpreter of its process."""
        if self.kind != "gemmconv" or not self.where or is_checkout(Path(self.where)):
            return sys.executable
        return str(interpreter(Path(self.where)))

    def without_path(self, text: str) -> str:
        """A text with the last part of `where` in place of it, since results say nothing of where files lie."""
        return text.replace(self.where, Path(self.where).name) if self.where else text

    def missing(self, op: str) -> str:
        """Why it cannot be measured on an operation: packages that are not installed, or it has none; else empty."""
        if op in LACKS.get(self.kind, ()):
            return f"it has no {op}"
        if (self.kind, self.what) == ("gemmconv", PREPARED) and op == FILTER_GRADIENT:
            return f"{op} has no filter to prepare"
        packages = [package for package in NEEDS.get(self.kind, ()) if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(packages)}" if packages else ""


def parse(text: str, op: str = TRANSPOSE) -> Spec:
    """Read a contender of an operation from the command line; a ValueError says what is wrong with it."""
    where, _, what = text.rpartition(":")
    if text in ("gemmconv", "gemmconv:auto"):
        return Spec(text, "gemmconv", "", "auto", "gemmconv")
    if text.startswith("gemmconv@"):
        return _elsewhere(text)
    if where == "gemmconv":
        from gemmconv.lowerings import LOWERINGS

        known = LOWERINGS[op]
        if what not in (*known, PREPARED):
            raise ValueError(
                f"{text}: gemmconv has no {op} algorithm {what!r}, it has auto, {', '.join(known)}, {PREPARED}"
            )
        return Spec(text, "gemmconv", "", what, text)
    if text == "numpy" or text in PEERS:
        return Spec(text, text, "", "", text)
    if text == "sgemm":
        return Spec(text, "sgemm", "", "", text)
    if not where or not what:
        raise ValueError(f"{text}: no such contender; it is one of {FORMS}")
    path = Path(where)
    library = any(suffix in path.suffixes for suffix in LIBRARY_SUFFIXES)
    if (library or path.suffix == ".py") and not path.is_file():
        raise ValueError(f"{text}: there is no file {where}")
    if library:
        return Spec(text, "library", str(path.resolve()), what, f"{path.name}:{what}")
    if path.suffix == ".py":
        return Spec(text, "file", str(path.resolve()), what, f"{path.name}:{what}")
    return Spec(text, "module", where, what, text)


def _elsewhere(text: str) -> Spec:
    """Read gemmconv@DIRECTORY, or that and an algorithm, which only the gemmconv that is there knows."""
    place, what = text.removeprefix("gemmconv@"), "auto"
    if ":" in place and not Path(place).is_dir():
        place, _, what = place.rpartition(":")
    path = Path(place).resolve()
    if not place or not what or not (is_checkout(path) or interpreter(path).is_file()):
        raise ValueError(f"{text}: {place!r} is neither a checkout of gemmconv nor a virtual environment")
    name = f"gemmconv@{path.name}" if what == "auto" else f"gemmconv@{path.name}:{what}"  # not where it lies
    return Spec(name, "gemmconv", str(path), what, name)


def is_checkout(path: Path) -> bool:
    """Whether a directory has a gemmconv of its own; it may be a virtual environment as well, which does not count."""
    return (path / "gemmconv" / "__init__.py").is_file()


def interpreter(path: Path) -> Path:
    """Where a virtual environment has its Python."""
    return path / "bin" / "python"


def parse_all(texts: list[str], op: str = TRANSPOSE) -> list[Spec]:
    """Read contenders; one that comes again gets a name of its own, which is how A is measured against A."""
    found: list[Spec] = []
    for text in texts:
        spec = parse(text, op)
        names = [other.name for other in found]
        again = next(
            n for n in range(1, len(names) + 2) if f"{spec.name}#{n}" not in names and (n > 1 or spec.name not in names)
        )
        found.append(spec if again == 1 else Spec(spec.text, spec.kind, spec.where, spec.what, f"{spec.name}#{again}"))
    return found


def load(spec: Spec, workers: int) -> Contender:
    """Import a contender into this process."""
    if spec.kind == "gemmconv" and spec.where and is_checkout(Path(spec.where)):
        sys.path.insert(0, spec.where)
    if spec.kind in ("gemmconv", "numpy"):
        from bench.contenders import own

        return own.Obvious() if spec.kind == "numpy" else own.Gemmconv(spec.what)
    if spec.kind in ("torch", "tensorflow", "jax"):
        from bench.contenders import frameworks

        return frameworks.FRAMEWORKS[spec.kind](workers)
    if spec.kind in ("onnxruntime", "openvino"):
        from bench.contenders import engines

        return engines.ENGINES[spec.kind](workers)
    if spec.kind == "sgemm":
        from bench.contenders import roof

        return roof.Sgemm()
    from bench.contenders import users

    if spec.kind == "library":
        return users.Library(spec.where, spec.what)
    return users.Function(spec.where, spec.what, is_file=spec.kind == "file")
