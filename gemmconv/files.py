"""Arrays in files for the command line: .npy, and Zarr where it is installed, read and written in boxes.

A .npy file is mapped anew for each box, so that what was read and written does not stay in this process' memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemmconv.newfile import map_reserved

Array = np.ndarray[Any, Any]


class NpyFile:
    """An array in a .npy file, which gives and takes boxes."""

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self._path, self._mode = path, "r+" if writable else "r"
        array = self._mapped()
        self.shape, self.dtype = array.shape, array.dtype

    def _mapped(self) -> Array:
        array: Array = np.load(self._path, mmap_mode=self._mode, allow_pickle=False)  # type: ignore[arg-type]
        return array

    def __getitem__(self, box: Any) -> Array:
        return np.array(self._mapped()[box])

    def __setitem__(self, box: Any, values: Array) -> None:
        array = self._mapped()
        array[box] = values
        array.flush()  # type: ignore[attr-defined]


def is_zarr(path: str | Path) -> bool:
    """Whether a name is one of a Zarr array: it ends so, or holds one."""
    path = Path(path)
    return path.suffix == ".zarr" or (path / "zarr.json").exists() or (path / ".zarray").exists()


def open_zarr(path: Path, *, writable: bool = False) -> Any:
    """Open a Zarr array; ImportError if Zarr is not installed, OSError or ValueError if it is none."""
    import zarr

    return zarr.open_array(str(path), mode="r+" if writable else "r")


def identity(path: Path) -> list[Any]:
    """Return what tells whether a file has changed: its place, size and time; of a Zarr array those of its head."""
    head = next((path / name for name in ("zarr.json", ".zarray") if (path / name).exists()), path)
    stat = head.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def make_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Make a .npy file with room for an array."""
    map_reserved(path, dtype, shape)


def make_zarr(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...]) -> None:
    """Make an empty Zarr array."""
    import zarr

    zarr.create_array(str(path), shape=shape, dtype=dtype, chunks=chunks)
