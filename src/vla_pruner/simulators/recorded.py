"""Files of an installed wheel, compared with the hashes that its RECORD holds: a task that was cut off or edited is
another task, and may still be read without an error.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import Distribution
from pathlib import Path

from vla_pruner.simulators.base import SimulatorUnavailable


class RecordedFiles:
    """Reads files of a distribution.

    Args:
        distribution: the installed one.
        fix: the command that installs it anew.

    Raises:
        SimulatorUnavailable: it has no RECORD, as after an installation that was cut off.
    """

    def __init__(self, distribution: Distribution, fix: str) -> None:
        self._name, self._fix = distribution.metadata["Name"].replace("_", "-"), fix
        if distribution.read_text("RECORD") is None:
            raise SimulatorUnavailable(f"{self._name} is not whole: its RECORD is missing", fix)
        self._hashes = {
            Path(str(file.locate())).resolve(): file.hash for file in distribution.files or () if file.hash is not None
        }

    def read(self, path: Path) -> bytes:
        """Return the content of a file.

        Raises:
            SimulatorUnavailable: it is missing, cannot be read, or is not what was installed.
        """
        if not path.is_file():
            raise SimulatorUnavailable(f"{self._name} is not whole: {path} is missing", self._fix)
        recorded = self._hashes.get(path.resolve())
        if recorded is None:
            raise SimulatorUnavailable(f"{path} is no file of {self._name}", self._fix)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SimulatorUnavailable(f"{path} cannot be read ({error.strerror or error})", self._fix) from error
        digest = base64.urlsafe_b64encode(hashlib.new(recorded.mode, content).digest()).rstrip(b"=").decode()
        if digest != recorded.value:
            raise SimulatorUnavailable(f"{path} is damaged: it is not the file that {self._name} installed", self._fix)
        return content
