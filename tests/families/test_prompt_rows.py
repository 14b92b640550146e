"""Whose attention is "the prompt's" in OpenVLA-OFT: rows before the first placeholder, for every method that reads it.

The expected scores are computed from the language model's inputs by hand, without the package.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vla_pruner as vp
from tests.families import cases, matrix

K = 3
ROWS = matrix.BOTH
ACTIONS = 56
HEADS = ["l1", "diffusion", None]


class Seen:
    """The first prompt of a control step as it enters a layer: embeddings, hidden states, and attention by hand."""

    def __init__(self, head: str | None, layer: int = K - 1) -> None:
        self.case = cases.openvla_oft(head)
        self.model: Any = self.case.build()
        decoder = self.model.language_model.model
        found: list[tuple[Tensor, ...]] = []

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found.append((hidden, kwargs["attention_mask"], *kwargs["position_embeddings"]))

        handles = [decoder.layers[at].register_forward_pre_hook(enter, with_kwargs=True) for at in (0, layer)]
        self.case.step(self.model, 0, ROWS)
        for handle in handles:
            handle.remove()
        self.embeds = found[0][0]
        hidden, mask, cos, sin = found[1]
        self.real = mask[:, 0, 0]
        block = decoder.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(hidden)

        def rotated(projection: Any) -> Tensor:
            states = projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            half = attention.head_dim // 2
            turned = torch.cat([-states[..., half:], states[..., :half]], -1)
            return states * cos[:, None] + turned * sin[:, None]

        self.logits = rotated(attention.q_proj) @ rotated(attention.k_proj).transpose(2, 3) * attention.head_dim**-0.5
        self.attention = self.logits.masked_fill(~self.real[:, None, None], -torch.inf).softmax(-1)
        self.visual = range(1, 1 + 512)
        # [BOS][visual][state][timestep, if any][instruction][placeholders][stop][padding]
        self.ends = [int(row.sum()) - ACTIONS - 1 for row in self.real]

    def rows(self, queries: str) -> list[range]:
        """Return the rows of each robot's prompt."""
        starts = {"all": lambda end: 0, "text": lambda end: self.visual.stop, "last": lambda end: end - 1}
        return [range(starts[queries](end), end) for end in self.ends]

    def score(self, rows: list[range], weights: Tensor) -> Tensor:
        """Return (2, 512): the attention of visual tokens from those rows, as the mean over heads and rows of (2, H, N,
        N).
        """
        return torch.stack(
            [w[:, list(row)].mean((0, 1))[list(self.visual)] for row, w in zip(rows, weights, strict=True)]
        )


@pytest.fixture(params=HEADS, ids=str, scope="module")
def seen(request: pytest.FixtureRequest) -> Seen:
    return Seen(request.param)


def found(seen: Seen, method: vp.Method) -> tuple[Tensor, Tensor]:
    with method.attach(seen.model) as session:
        seen.case.step(seen.model, 0, ROWS)
        assert session.kept is not None
        return session.scores["semantic"], session.kept


def expect(seen: Seen, method: vp.Method, expected: Tensor) -> None:
    score, kept = found(seen, method)
    torch.testing.assert_close(score, expected, atol=1e-5, rtol=1e-4)
    if isinstance(method, vp.FastV):
        assert torch.equal(kept, expected.topk(128).indices.sort().values)


@pytest.mark.parametrize("queries", ["all", "text", "last"])
def test_rows_that_act_are_no_prompt(seen: Seen, queries: str) -> None:
    assert len({len(rows) for rows in seen.rows("text")}) == 2, "prompts must differ in length"
    expected = seen.score(seen.rows(queries), seen.attention)
    everything = [range(row.start, row.stop + ACTIONS + 1) for row in seen.rows(queries)]
    assert (seen.score(everything, seen.attention) - expected).abs().max() > 1e-3, "or nothing could fail"
    expect(seen, vp.FastV(keep=0.25, layer=K, semantic_queries=queries), expected)
    options: dict[str, Any] = {"keep": 0.25, "layer": K, "window": 1, "semantic_queries": queries}
    expect(seen, vp.VLAPruner(**options, warmup="semantic", preset="paper"), expected)


def test_what_reads_text_reads_no_placeholders(seen: Seen) -> None:
    text = seen.rows("text")
    expect(seen, vp.TextQuery(keep=0.25, layer=K), seen.score(text, seen.logits))
    raters = []
    for row, embeds in zip(text, seen.embeds, strict=True):
        words = embeds[list(row)]
        relevance = (embeds[list(seen.visual)] @ words.T).softmax(1).mean(0)
        raters.append([row[i] for i in torch.nonzero(relevance >= relevance.mean()).flatten().tolist()])
    assert all(0 < len(rating) < len(row) for rating, row in zip(raters, text, strict=True))
    expect(seen, vp.SparseVLM(keep=0.25, layer=K), seen.score(raters, seen.attention))


@pytest.mark.parametrize("queries", ["all", "text", "last"])
def test_memory_holds_the_score_of_the_same_rows(queries: str) -> None:
    """Before the decoder, tokens are chosen by the memory's semantic score."""
    seen = Seen("l1")
    method = vp.VLAPruner(keep=0.25, layer=0, window=1, refresh_every=9, semantic_queries=queries, preset="paper")
    expected = seen.score(seen.rows(queries), seen.attention)
    with method.attach(seen.model) as session:
        seen.case.step(seen.model, 0, ROWS)
        assert session.memory is not None
        torch.testing.assert_close(session.memory.semantic[:, -1], expected, atol=1e-5, rtol=1e-4)
