"""The settings of the demo, checked before anything slow begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vla_pruner.checks import is_count, is_number
from vla_pruner.errors import OptionError, VLAPrunerError
from vla_pruner.flags import number_or_name
from vla_pruner.outputs import check_folder

DEFAULT_EPISODES = 6
DEFAULT_MINUTES = 6.5
QUICK_EPISODES = 1
QUICK_MINUTES = 1.1
DEFAULT_OUT = Path("demo-output")


@dataclass(frozen=True)
class DemoSuite:
    """A benchmark that the demo runs on.

    Attributes:
        policy: name of the reference policy that was trained on it.
        first: the first initial state that runs if none is named.
        states: initial states of a task; None: one for each seed.
    """

    policy: str
    first: int
    states: int | None


SUITES = {
    "metaworld": DemoSuite("metaworld", first=1_000_000, states=None),
    "libero_object": DemoSuite("libero-object", first=0, states=50),
}
DEFAULT_SUITE = "metaworld"


class DemoError(VLAPrunerError):
    """The demo cannot run as asked; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class DemoSettings:
    """The flags of `vla-pruner demo`.

    Attributes:
        tasks: names or numbers of tasks; None for all that the policy was trained on.
        episodes: episodes a task and arm; None for the default.
        keep: fraction of the visual tokens that the pruned arms keep, in (0, 1]; None: as each setting says.
        seed: the first initial state: in Meta-World the seed that draws it, in LIBERO the number of a stored one; None:
            the suite's own.
        out: folder that the report and the results are written to.
        quick: fewer episodes, for a first look.
        weights: a reference policy's name, or the folder of one's weights; None: the suite's.
        suite: a key of `SUITES`; None: the one that the weights were trained on.
        compile: whether every arm is compiled; None: unless it is `quick`, and if torch can compile here.
    """

    tasks: tuple[str, ...] | None = None
    episodes: int | None = None
    keep: float | None = None
    seed: int | None = None
    out: Path = DEFAULT_OUT
    quick: bool = False
    weights: str | Path | None = None
    suite: str | None = None
    compile: bool | None = None

    @property
    def policy(self) -> str | Path:
        """The reference policy that runs: the suite's unless `weights` names another."""
        return SUITES[self.suite or DEFAULT_SUITE].policy if self.weights is None else self.weights

    def first_state(self, suite: str) -> int:
        """Return the first initial state.

        Raises:
            DemoError: the suite has no such state, or too few from there on.
        """
        known = SUITES[suite]
        first = known.first if self.seed is None else self.seed
        if known.states is not None and first + self.episodes_a_task > known.states:
            raise DemoError(
                f"{suite} has {known.states} initial states a task, from 0 on, and {first} + {self.episodes_a_task} is "
                "more; lower --episodes or --seed."
            )
        return first

    @property
    def episodes_a_task(self) -> int:
        if self.episodes is not None:
            return self.episodes
        return QUICK_EPISODES if self.quick else DEFAULT_EPISODES

    @property
    def minutes(self) -> float | None:
        """Minutes, those of compiling included, after which no episode starts, so that the demo ends in time on a slow
        machine; None: no limit.
        """
        if self.episodes is not None:
            return None  # the number of episodes was given: run them all
        return QUICK_MINUTES if self.quick else DEFAULT_MINUTES

    @property
    def compiles(self) -> bool:
        """True if the arms are to be compiled; torch may be unable to."""
        return not self.quick if self.compile is None else self.compile

    def check(self) -> None:
        """Raise DemoError for the first setting that is out of its range."""
        if self.keep is not None and (not is_number(self.keep) or not 0.0 < self.keep <= 1.0):
            raise DemoError(f"--keep is {self.keep!r}; it is a fraction of the visual tokens, above 0 and up to 1.")
        if self.episodes is not None and not is_count(self.episodes, 1):
            raise DemoError(f"--episodes is {self.episodes!r}; it is a whole number of 1 or more for each task.")
        if self.suite is not None and self.suite not in SUITES:
            raise DemoError(f"--suite is {self.suite}; it is one of {', '.join(SUITES)}.")
        if self.seed is not None and not is_count(self.seed, 0):
            raise DemoError(f"--seed is {self.seed!r}; it is a whole number of 0 or more.")
        for name, value in {"--quick": self.quick, "--compile": self.compile or False}.items():
            if not isinstance(value, bool):
                raise DemoError(f"{name} is {value!r}; it is True or False.")
        if self.tasks is not None and not isinstance(self.tasks, (tuple, list)):
            raise DemoError(f"--tasks is {self.tasks!r}; it is a tuple of tasks, of which there may be one.")
        if self.tasks is not None and not self.tasks:
            raise DemoError("--tasks names no task; give names or numbers separated by commas, or leave the flag out.")
        try:
            check_folder(self.out)
        except OptionError as error:
            raise DemoError(str(error)) from error


def choose_tasks(asked: tuple[str, ...] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tasks to run, in the order asked, each once.

    Args:
        asked: names or numbers; None for all.
        known: names of the policy's tasks, which are those of its suite, in its order.

    Raises:
        DemoError: one is unknown.
    """
    if asked is None:
        return known
    by = {**dict(enumerate(known)), **{name: name for name in known}}
    unknown = [task for task in asked if number_or_name(task) not in by]
    if unknown:
        tasks = ", ".join(f"{number} {name}" for number, name in enumerate(known))
        raise DemoError(f"Unknown task {', '.join(unknown)}; the policy knows these tasks: {tasks}.")
    return tuple(dict.fromkeys(by[number_or_name(task)] for task in asked))
