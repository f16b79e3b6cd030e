"""`show_config()`: what gemmconv found here and what it uses, put together from machine, blas and threads.

This module asks and prints; it must not find out anything itself. To be quoted with every measurement and bug report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemmconv import blas, machine, threads


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Print which BLAS, kernels, threads and caches gemmconv uses, and why.

    Parameters
    ----------
    mode : {'stdout', 'dicts'}
        'stdout' prints text; 'dicts' returns the same as a dict that `json.dumps` takes, as in `numpy.show_config`.

    Returns
    -------
    dict or None
        The parts are 'versions', 'cpu', 'machine' (cores and caches), 'blas' (what GEMMs run on), 'threads',
        'libraries' (every BLAS that is loaded, and whether it is the one used: None where that is not known),
        'variables' (of the environment, where they limit threads or choose kernels) and 'warnings' (sentences about
        variables that hold a BLAS at older kernels than the CPU has).

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import gemmconv
    >>> config = gemmconv.show_config(mode="dicts")
    >>> config["machine"]["usable_cores"] >= 1
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"show_config: mode={mode!r} is unknown: 'stdout' prints, 'dicts' returns a dict")
    # Before machine.config() lists what is loaded: describing the BLAS loads it.
    parts = {"blas": blas.describe(), "threads": threads.describe()}
    facts = machine.config()
    for library in facts["libraries"]:
        library["used"] = _is_used(library["filepath"], len(facts["libraries"]), parts["blas"])
    config = {key: facts.pop(key) for key in ("versions", "cpu", "machine")} | parts | facts
    if mode == "dicts":
        return config
    print(format_config(config))
    return None


def _is_used(filepath: str, libraries: int, paths: Mapping[str, Any]) -> bool | None:
    """Whether a loaded BLAS is the one behind the paths taken: the only one, or the one its package's wheel brings."""
    if libraries == 1:
        return True
    folder = Path(filepath).parent
    owner = folder.name.removesuffix(".libs") if folder.name != ".dylibs" else folder.parent.name
    if owner not in ("numpy", "scipy"):
        return None
    return any(path["path"].startswith(f"{owner}.") for path in paths.values())


def format_config(config: Mapping[str, Any]) -> str:
    """`show_config()`'s data as aligned text: a heading for every part, a line for every fact."""
    return "\n".join(line for key, value in config.items() for line in (f"{key}:", *_format(value, key)))


def _format(value: Any, key: str, indent: str = "  ") -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        width = max(map(len, value))
        for name, item in value.items():
            nested = isinstance(item, Mapping) or (isinstance(item, list | tuple) and any(map(_is_nested, item)))
            if nested and item:
                yield f"{indent}{name}:"
                yield from _format(item, name, indent + "  ")
            else:
                yield f"{indent}{name:<{width}}  {_scalar(item, name)}"
    elif isinstance(value, list | tuple) and value:
        for item in value:
            lines = list(_format(item, key, indent + "  "))
            yield f"{indent}- {lines[0].lstrip()}"
            yield from lines[1:]
    else:
        yield f"{indent}{_scalar(value, key)}"


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _scalar(value: Any, key: str) -> str:
    if value is None or value == "" or (_is_nested(value) and not value):
        return "none"
    if _is_nested(value):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value} ({value / 2**20:g} MiB)" if value >= 1 << 20 else f"{value} ({value / 2**10:g} KiB)"
    return str(value)
