"""The settings of a server, checked before anything slow begins."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vla_pruner.checks import is_count, is_number, is_seed
from vla_pruner.serving.errors import ServingError

MEBIBYTE = 2**20
KEY_VARIABLE = "VLA_PRUNER_API_KEY"
"""The environment variable of the key that clients must send."""

OWN_METADATA = frozenset({
    "protocol", "server", "model", "pruner", "visual_tokens", "action_horizon", "action_dim", "image_keys",
    "state_keys", "state_size", "max_message",
})  # fmt: skip
"""The keys of the metadata that the server itself sets."""


@dataclass(frozen=True)
class ServerSettings:
    """The flags of `vla-pruner serve` that are not about the policy. Errors name the flags, in the flags' units.

    Attributes:
        host: address that is listened on.
        port: 0 takes a free one.
        api_key: the key that clients must send as `Authorization: Api-Key ...`; None: none.
        tls_cert, tls_key: PEM files; both or none.
        observations: the layout of observations: a name of `observations.LAYOUTS`.
        camera_keys: a policy's camera -> the key of its image, in place of the layout's.
        max_robots: connections at a time; a further one is refused with 503.
        max_waiting: control steps that may wait for the model; a further one is refused, and its connection closed.
        max_message: bytes of one message; a longer one closes its connection with 1009.
        max_batch: robots in one forward pass.
        batch_window: seconds that a control step waits for others to share its pass, while there are others.
        ping_interval: seconds between keep-alives.
        ping_timeout: seconds until a client counts as gone that answers none, or does not read its messages; its
            connection is cut then.
        grace: seconds that a shutdown waits for answers that are under way.
        seed: of the policies' draws; the noise of a control step depends on it, on the robot's episode and step alone.
        prompts: instructions that are run before the port opens; none: one that the policy knows.
        compile: whether the policy is compiled before the port opens.
        only_if_faster: whether control steps are timed before the port opens, and the policy is served unpruned if
            pruned ones are not faster.
        name: of the model in the metadata.
        metadata: more entries for clients that connect, such as {"reset_pose": [...]}.
        default_prompt: the instruction of observations that have none; None: they are refused.
        episode_gap: seconds without an observation after which a robot's next one begins an episode; None: silence
            does not.
        episode_jump: how far one number of the robot's state may be from the observation before; a larger jump begins
            an episode; None: no state does.
        action_dim: how many numbers of an action are sent, the first ones; None: those that the layout's robot takes
            (libero 7, droid 8, aloha 14), or all.
        action_horizon: how many actions of a chunk are sent, the first ones; None: all.
        center_crop: for OpenVLA and OFT with the layout "libero": whether the checkpoint was trained with image
            augmentation, as published ones.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    observations: str = "cameras"
    camera_keys: Mapping[str, str] = field(default_factory=dict)
    max_robots: int = 64
    max_waiting: int = 64
    max_message: int = 16 * MEBIBYTE
    max_batch: int = 16
    batch_window: float = 0.002
    ping_interval: float = 20.0
    ping_timeout: float = 20.0
    grace: float = 30.0
    seed: int = 0
    prompts: tuple[str, ...] = ()
    compile: bool = False
    only_if_faster: bool = False
    name: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    default_prompt: str | None = None
    episode_gap: float | None = None
    episode_jump: float | None = None
    action_dim: int | None = None
    action_horizon: int | None = None
    center_crop: bool = True

    def __post_init__(self) -> None:
        for name in ("max_robots", "max_waiting", "max_batch"):
            if not is_count(getattr(self, name), 1):
                raise ServingError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}; it is a whole number of 1 or more."
                )
        if not is_count(self.max_message, 1):
            whole = isinstance(self.max_message, int)
            found = f"{self.max_message / MEBIBYTE:g} MiB" if whole else f"{self.max_message!r} bytes"
            raise ServingError(f"--max-message is {found}; it is a whole number of 1 or more.")
        for name, value in {
            "--grace": self.grace,
            "ping_interval": self.ping_interval,
            "ping_timeout": self.ping_timeout,
        }.items():
            if not is_number(value) or value <= 0:
                raise ServingError(f"{name} is {value!r}; it is a number of seconds above 0.")
        for name, value in {"--episode-gap": self.episode_gap, "--episode-jump": self.episode_jump}.items():
            if value is not None and (not is_number(value) or value <= 0):
                raise ServingError(f"{name} is {value!r}; it is a finite number above 0.")
        for name, value in {"--action-dim": self.action_dim, "--action-horizon": self.action_horizon}.items():
            if value is not None and not is_count(value, 1):
                raise ServingError(f"{name} is {value!r}; it is a whole number of 1 or more.")
        for name, value in {
            "--compile": self.compile,
            "--only-if-faster": self.only_if_faster,
            "center_crop": self.center_crop,
        }.items():
            if not isinstance(value, bool):
                raise ServingError(f"{name} is {value!r}; it is True or False.")
        self._check_metadata()
        if not isinstance(self.prompts, (tuple, list)) or not all(isinstance(one, str) for one in self.prompts):
            raise ServingError(f"--prompt is {self.prompts!r}; it is a tuple of instructions.")
        if self.default_prompt is not None and not self.default_prompt.strip():
            raise ServingError("--default-prompt is empty; give the instruction that your policy was trained on.")
        if not is_number(self.batch_window) or not 0 <= self.batch_window <= 1:
            found = f"{1e3 * self.batch_window:g} ms" if is_number(self.batch_window) else repr(self.batch_window)
            raise ServingError(f"--batch-window is {found}; it is 0 to 1000 ms, such as 2.")
        if not is_count(self.port, 0) or self.port >= 2**16:
            raise ServingError(f"--port is {self.port!r}; it is a number from 0 (a free one) to 65535.")
        if not is_seed(self.seed):
            raise ServingError(f"--seed is {self.seed!r}; it is a whole number of 0 or more, and below 2**32.")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServingError("A certificate and its key go together: give both --tls-cert and --tls-key, or none.")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or " " in self.api_key):
            raise ServingError("The API key is empty, or has blanks or characters beyond ASCII; choose another.")

    def _check_metadata(self) -> None:
        """Refuse metadata that no client could read, or that would hide the server's own."""
        if not isinstance(self.metadata, Mapping) or not all(isinstance(key, str) for key in self.metadata):
            raise ServingError('--metadata is no map of names to values, such as {"reset_pose": [0.0, 1.5]}.')
        taken = sorted(OWN_METADATA & set(self.metadata))
        if taken:
            raise ServingError(f"--metadata has {', '.join(map(repr, taken))}, which the server says itself.")
        if not self.metadata:
            return
        try:
            from vla_pruner.client.codec import pack, unpack
            from vla_pruner.client.errors import CodecError
        except ImportError:  # without the extra nothing is served, and another check refuses it
            return
        try:
            unpack(pack(dict(self.metadata)))
        except CodecError as error:
            raise ServingError(f"--metadata cannot be sent: {error}") from error

    @property
    def is_open(self) -> bool:
        """True if other machines can reach the port and no key is required."""
        return self.api_key is None and not is_loopback(self.host)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Numbers of robots that share a pass, largest first. Compiled, each size is a program of its own, so there
        are only powers of two.
        """
        if not self.compile:
            return tuple(range(self.max_batch, 0, -1))
        return tuple(2**power for power in reversed(range(self.max_batch.bit_length())))


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
