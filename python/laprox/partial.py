"""A long run that may be interrupted: what is finished lies beside the output until all is."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def check_writable(output: Path) -> None:
    """Raises ValueError if a file can't be made there: better now than after hours."""
    try:
        if output.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise ValueError(f"{output} can't be written: {error.strerror}") from None


class Partial:
    """The folder `<output>.partial`: settings.json, and an array for each finished part."""

    def __init__(self, output: Path, settings: dict[str, Any], restart: bool = False) -> None:
        """Begin or go on.

        Raises:
            ValueError: It is of a run with other settings; names them.
            OSError: It can't be written.
        """
        self.folder = output.with_name(output.name + ".partial")
        self._output = output
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        self._agree(json.loads(json.dumps(settings)))

    def __contains__(self, part: int) -> bool:
        return self._path(part).exists()

    def keep(self, part: int, array: npt.NDArray[Any]) -> None:
        """A part is finished."""
        unfinished = self._path(part).with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            np.save(file, array)
        os.replace(unfinished, self._path(part))

    def parts(self, n: int) -> list[npt.NDArray[Any]]:
        """All of them, in order."""
        return [np.load(self._path(part)) for part in range(n)]

    def finish(self, data: bytes) -> None:
        """Write the output, whole or not at all, and tidy up."""
        unfinished = self.folder / "output"
        unfinished.write_bytes(data)
        os.replace(unfinished, self._output)
        shutil.rmtree(self.folder)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06}.npy"

    def _agree(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        try:
            before = json.loads(path.read_text())
        except FileNotFoundError:
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(settings, indent=1) + "\n")
            os.replace(unfinished, path)
            return
        except ValueError:
            before = {}
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.folder} is of another run: its {name} is {before.get(name)!r}, now it is {settings.get(name)!r}. "
                    "Give the same settings to go on with it, or --restart to begin anew"
                )
