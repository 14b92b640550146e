"""VLA-ADP: keep the visual tokens whose keys match the text's queries, while the arm moves far (arXiv 2509.22093)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vla_pruner.methods.schedule import Schedule
from vla_pruner.methods.scored import SemanticallyScored


@dataclass(frozen=True)
class TextQuery(SemanticallyScored):
    """The top k visual tokens by the mean over heads and text rows of q . k / sqrt(d) in the first layer.

    Paper: Pei et al., "Action-aware Dynamic Pruning" (VLA-ADP), ICLR 2026, arXiv 2509.22093: text queries and visual
    keys of layer 0 give the score, no softmax; the highest k = floor(keep x M) stay. Its gate prunes a control step
    unless the arm's path in the step before, sum |p_{t+1} - p_t| over the chunk, is at most the smallest of the last
    tau; the first two steps, and the one after three pruned in a row, run unpruned. With `gate=tau` that is done here,
    from `session.moved(path)` after each step; without it this is the ablation without dynamics ("w/o D").

    Paper's defaults: keep .3 to .7 before layer 0; of two cameras' budget 4/10 to the scene and 6/10 to the wrist (here
    a `keep` per camera: {"image": .4, "wrist_image": .6} is .5 of both together); gated. Reference numbers (OpenVLA-OFT
    on LIBERO, mean success, unpruned 97.1 %): with the gate 96.3 % at keep .5, 94.4 % at .3; without it 93.5 %. With
    the gate 1.23 and 1.35 times faster. Deviations: the first layer still sees every token (`layer=1`); k is rounded,
    not cut off; queries and keys carry their rotary angles; text is the part of the prompt after the image, a token of
    the robot's state included. The gate is off by default, since only the robot's side has the path. In a batch the
    closed gate of one row leaves every row unpruned, since all rows share one shape.

    Attributes:
        keep, warmup_steps: see `Budgeted`.
        gate: tau, the control steps among which the last one's path must not be the shortest, itself included: an int
            of 2 or more. None prunes whatever the arm does.
        layer: layers before this one run on every token; the score is read at the last of them. 1 reads layer 0.
        pruned: see `Method`.
    """

    gate: int | None = field(default=None, kw_only=True)
    layer: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.schedule  # refuses values out of range

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.warmup_steps, gate=self.gate)

    @property
    def queries(self) -> str:
        return "text"

    @property
    def attention(self) -> str:
        return "logits"
