"""The results of an audit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: of the check, the same in every audit.
        passed: None if it could not be checked; `detail` says why.
        figure: the measurement, in a few words.
        detail: its meaning, the comparison, and the fix if it failed.
        observations: the number of control steps that it ran.
    """

    name: str
    passed: bool | None
    figure: str = ""
    detail: str = ""
    observations: int = 0


@dataclass(frozen=True)
class AuditReport:
    """All checks of one policy with one method.

    Attributes:
        policy: the policy's class.
        method: as Python shows it.
        settings: device, dtype, attention backend, sizes, versions and seconds.
        checks: in the order in which they ran.
    """

    policy: str
    method: str
    settings: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if no check failed. Those that could not be run do not count."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name; the KeyError of any other lists the names."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check is called {name}; there are {', '.join(check.name for check in self.checks)}")

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`."""
        return {
            "policy": self.policy,
            "method": self.method,
            "passed": self.passed,
            "settings": self.settings,
            "checks": [asdict(check) for check in self.checks],
        }
