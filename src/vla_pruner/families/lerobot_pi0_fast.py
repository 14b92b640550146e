"""LeRobot's pi0-FAST (`PI0FastPolicy`): a PaliGemma that decodes its action chunk as tokens.

The prefix [image blocks][text][BOS] runs once per action chunk, and every token after it reads its cache. Action
attention is that of the positions that emit the tokens: the prefix's last one, then every decoded token. The rows of a
batch are decoded until all of them have emitted the end marker or, with a temperature, until the configured length.
Tokens after a row's marker are discarded, so the row's attention does not count after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call
from vla_pruner.attach.layout import Layout
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.families.lerobot_pi import LeRobotPi

_NO_CACHE = (
    "pi0-FAST with use_kv_cache=False runs the whole prompt again, a token longer, for every token that it decodes, "
    "which is not supported together with pruning; set use_kv_cache=True, which decodes the same tokens."
)


class LeRobotPi0Fast(LeRobotPi):
    """LeRobot's `PI0FastPolicy`; every chunk that it predicts is one control step."""

    classes = frozenset({("lerobot.policies.pi0_fast.modeling_pi0_fast", "PI0FastPolicy")})
    embed = "embed_prefix_fast"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._check_cached()
        self._ended: Tensor | None = None

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        seeing = model.model.paligemma_with_expert.paligemma.model
        return Anatomy(
            decoder=seeing.language_model, towers=(seeing.vision_tower,), projectors=(seeing.multi_modal_projector,)
        )

    @property
    def first_layer(self) -> int:
        return 0

    @property
    def backend(self) -> str:
        return self.decoder.config._attn_implementation

    def opens_step(self, call: Call) -> bool:
        return call.length > 1

    def action_rows(self, layout: Layout) -> Tensor | None:
        return layout.last()

    def still_acting(self) -> Tensor | None:
        return None if self._ended is None else ~self._ended

    def install(self) -> None:
        super().install()
        self._replaced.put(self._inner, "sample_actions_fast", _refuse_without_cache)
        self._replaced.put(self._inner.paligemma_with_expert, "embed_language_tokens", self._embed_tokens)

    def remove(self) -> None:
        super().remove()
        self._ended = None

    def _embed_prefix(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = super()._embed_prefix(original, *args, **kwargs)
        self._ended = None
        return found

    def _embed_tokens(self, original: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 1:
            marker = self._inner._paligemma_tokenizer.convert_tokens_to_ids("|")
            ended = tokens[:, 0] == marker
            self._ended = ended if self._ended is None else self._ended | ended
        return original(tokens)

    def _prepare_images(self, original: Callable[..., Any], batch: Any) -> Any:
        self._check_cached()
        return super()._prepare_images(original, batch)

    def _check_cached(self) -> None:
        if not self._policy.config.use_kv_cache:
            raise UnsupportedModelError(_NO_CACHE)


def _refuse_without_cache(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise SessionError(_NO_CACHE)
