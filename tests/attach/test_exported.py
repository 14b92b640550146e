"""A control step as a program of tensors computes the same as the session, and so does its ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vla_pruner as vp
from tests.attach.tiny import VISUAL, prompt, tiny_lm
from tests.families.cases import shallow
from tests.state import whole_state
from vla_pruner.attach.exported import ExportedStep, _searchsorted, _stable_sort
from vla_pruner.methods.memory import Memory

# torch's export raises warnings about torch itself, and ONNX about features that are not used here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@dataclass
class Case:
    """A tiny policy with an example of a step's inputs for each scene."""

    model: Any
    example: Callable[[int], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


def decoder_lm(layers: int = 3) -> Case:
    model = tiny_lm(num_hidden_layers=layers)
    return Case(model, lambda scene: {"inputs_embeds": prompt(2, seed=scene)[0], "tokens": 2}, {"visual": VISUAL})


def trained(name: str, **settings: Any) -> Case:
    model: Any = shallow(name, layers=3, **settings)
    shape = (2, *model.frame_shape)

    def example(scene: int) -> dict[str, Any]:
        draw = np.random.default_rng(scene)
        images = draw.integers(0, 256, shape, dtype=np.uint8)
        state = draw.normal(size=(2, model.proprio_size)).astype(np.float32)
        return {"images": images, "instruction": list(model.instructions[:2]), "proprio": state}

    return Case(model, example)


def openvla_oft(head: str | None = "l1") -> Case:
    from vla_pruner.models.openvla import random_openvla

    model: Any = random_openvla(size="tiny", oft=True, head=head, num_hidden_layers=3)

    def example(scene: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(scene)
        ids = torch.randint(3, 300, (1, 9), generator=draw)
        ids[:, 0], ids[:, -1] = 1, 29871
        pixels = torch.randn(1, 6 * len(model.cameras), 224, 224, generator=draw)
        return {"input_ids": ids, "pixel_values": pixels, "proprio": torch.randn(8, generator=draw)}

    return Case(model, example)


CASES = {
    "decoder_lm": decoder_lm,
    "reference": lambda: trained("reference", action_dimensions=3),
    "reference-chunk": lambda: trained("reference-chunk"),
    "oft": openvla_oft,
}
METHOD = vp.VLAPruner(keep=6, layer=1, window=2, preset="paper")


@cache
def exported(name: str, pruned: str = "drop") -> tuple[Case, ExportedStep]:
    """Return a case and the program of its pruned step, which several tests look at."""
    case = CASES[name]()
    with replace(METHOD, pruned=pruned).attach(case.model, **case.options) as session:
        return case, session.export(case.example(0))


def by_session(case: Case, session: vp.Session, scene: int) -> Tensor:
    """Run a control step of the session and return the output that the program returns, too."""
    function = session.family.exported(case.example(scene))
    with torch.no_grad():
        return function.run(**function.inputs)


def inputs_of(case: Case, session: vp.Session, scene: int) -> dict[str, Tensor]:
    """Return a program's inputs for a scene, without the history."""
    return session.family.exported(case.example(scene)).inputs


def output_of(step: ExportedStep) -> str:
    """Return the name of the policy's own output."""
    return step.outputs[0]


@pytest.mark.parametrize(
    ("name", "pruned"), [*((name, "drop") for name in CASES), ("decoder_lm", "freeze"), ("oft", "freeze")]
)
def test_a_program_does_what_the_session_does(name: str, pruned: str) -> None:
    case, step = exported(name, pruned)
    with replace(METHOD, pruned=pruned).attach(case.model, **case.options) as session:
        program = step.program.module()
        for scene in range(2):
            by_session(case, session, scene)
            assert session.kept is None
        for scene in (2, 3):
            before = session.memory
            assert before is not None
            expected = by_session(case, session, scene)
            assert session.kept is not None
            found = program(**inputs_of(case, session, scene), **step.history(before))
            torch.testing.assert_close(found[output_of(step)], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(found["kept"], session.kept)
            assert session.memory is not None
            for key, value in step.history(session.memory).items():
                torch.testing.assert_close(step.next(found)[key], value, rtol=1e-4, atol=1e-5)
        other = program(**inputs_of(case, session, 3), **step.start())
        assert not torch.equal(other["kept"], found["kept"]), "the history must count, or this test could not fail"
        assert not torch.equal(by_session(case, session, 4), expected)


METHODS = (
    vp.CDPruner(keep=6, layer=1),
    vp.DART(keep=6, layer=1),
    vp.DivPrune(keep=6, layer=2),
    vp.ActionOnly(keep={"a": 3, "b": 4}, layer=1, window=1, unseen="carry"),
    vp.SparseVLM(keep=12, layer=1, then=((2, 6),)),
    vp.VLAPruner(keep=6, layer=0, window=1, refresh_every=9, preset="paper"),
    vp.VLAPruner(keep=6, layer=0, window=1, refresh_every=9, pruned="freeze", preset="paper"),
)


@pytest.mark.parametrize(
    "method", METHODS, ids=lambda method: f"{type(method).__name__}-{method.layer}-{method.pruned}"
)
def test_every_method_that_is_tensors_is_exported(method: vp.Method) -> None:
    case = decoder_lm()
    visual = {"a": slice(1, 13), "b": slice(13, 25)}
    with method.attach(case.model, visual=visual) as session:
        step = session.export(case.example(0))
        program = step.program.module()
        for scene in range(3):
            before = session.memory
            expected = by_session(case, session, scene)
        assert session.kept is not None
        assert before is not None
        found = program(**inputs_of(case, session, 2), **step.history(before))
        torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found["kept"], session.kept)
        assert session.memory is not None
        for key, value in step.history(session.memory).items():
            torch.testing.assert_close(step.next(found)[key], value, rtol=1e-4, atol=1e-5)


def test_a_whole_episode_by_programs_alone() -> None:
    case = decoder_lm()
    with METHOD.attach(case.model, **case.options) as session:
        warm_up, pruned = session.export(case.example(0), pruned=False), session.export(case.example(0))
        assert "kept" not in warm_up.outputs
        assert list(warm_up.inputs) == list(pruned.inputs)
        given, found = [inputs_of(case, session, scene) for scene in range(4)], []
        expected = [(by_session(case, session, scene), session.kept) for scene in range(4)]
    history = warm_up.start()
    for scene, inputs in enumerate(given):
        step = warm_up if scene < METHOD.window else pruned
        found.append(step.program.module()(**inputs, **history))
        history = step.next(found[-1])
    for one, (logits, kept) in zip(found, expected, strict=True):
        torch.testing.assert_close(one["logits"], logits, rtol=1e-4, atol=1e-4)
        assert (kept is None) == ("kept" not in one)
        if kept is not None:
            assert torch.equal(one["kept"], kept)


def test_exporting_leaves_the_session_and_the_model_as_they_were() -> None:
    case = decoder_lm()
    before = whole_state(case.model)
    with METHOD.attach(case.model, **case.options) as session:
        for scene in range(3):
            by_session(case, session, scene)
        attached, memory, kept = whole_state(case.model), session.memory, session.kept
        session.export(case.example(0))
        assert memory is not None
        assert kept is not None
        assert session.memory is not None
        for name, value in session.memory.state_dict().items():
            assert torch.equal(value, memory.state_dict()[name])
        assert session.kept is not None
        assert torch.equal(session.kept, kept)
        assert whole_state(case.model) == attached
        by_session(case, session, 3)
    assert whole_state(case.model) == before


def test_a_memory_of_other_calls_is_the_history() -> None:
    """A memory from the policy's own calls, which run in inference mode, is the history; that of another batch size is
    not.
    """
    case = trained("reference-chunk")
    with METHOD.attach(case.model) as session:
        for scene in range(3):
            case.model.predict_action(**case.example(scene))
        memory = session.memory
        assert memory is not None
        step = session.export(case.example(0))
        assert torch.equal(step.inputs["history_action"], memory.action)
        assert step.start()["history_action"].abs().max() == 0
        single = {name: value[:1] for name, value in case.example(0).items()}
        alone = session.export(single)
        assert alone.inputs["history_action"].shape[0] == 1
        assert alone.program.module()(**alone.inputs)["kept"].shape == (1, 6)


def test_a_method_without_history_takes_none() -> None:
    case = decoder_lm()
    with vp.FastV(keep=6, layer=1).attach(case.model, **case.options) as session:
        step = session.export(case.example(0))
        assert (list(step.inputs), step.outputs) == (["inputs_embeds"], ("logits", "kept"))
        assert (step.start(), step.next({})) == ({}, {})
        expected = by_session(case, session, 1)
        found = step.program.module()(**inputs_of(case, session, 1))
        torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)


def test_no_operator_is_left_that_other_runtimes_lack() -> None:
    graph = exported("decoder_lm")[1].program.graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert any(name.startswith("aten.") for name in names)
    assert not [name for name in names if "vla_pruner" in name or "sort" in name]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int64])
def test_sorting_by_counting_is_sorting(dtype: torch.dtype, dim: int, descending: bool) -> None:
    values = torch.randint(-4, 5, (17, 23), generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype.is_floating_point:
        values[3], values[:, 5] = -torch.inf, torch.inf
    found = _stable_sort(values, dim=dim, descending=descending)
    expected = torch.sort(values, dim=dim, descending=descending, stable=True)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)
    line = values.sort(dim=1).values.contiguous()
    for right in (False, True):
        places = torch.searchsorted(line, values.contiguous(), right=right)
        assert torch.equal(_searchsorted(line, values, right=right), places)


class ReadsOnTheHost(vp.FastV):
    """A method that reads a score on the host, so that no program can run it."""

    def select(self, evidence: vp.Evidence, k: int) -> Tensor:
        assert evidence.semantic is not None
        return super().select(evidence, min(k, int(evidence.semantic.sum().item() + 1e6)))


class CountsOnTheHost(vp.FastV):
    """A method that reads a counter in `select`, which would be baked in."""

    def select(self, evidence: vp.Evidence, k: int) -> Tensor:
        return super().select(evidence, k if max(evidence.memory.steps.tolist()) < 10**6 else 1)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (ReadsOnTheHost(keep=6, layer=1), "ReadsOnTheHost cannot be exported .*no item"),
        (CountsOnTheHost(keep=6, layer=1), "CountsOnTheHost cannot be exported .*no item"),
        (vp.RandomKeep(keep=6, layer=1), "RandomKeep draws or reads on the host"),
    ],
)
def test_methods_that_cannot_be_exported_are_refused(method: vp.Method, says: str) -> None:
    case = decoder_lm()
    with method.attach(case.model, **case.options) as session:
        with pytest.raises(vp.UnsupportedModelError, match=says):
            session.export(case.example(0))
        by_session(case, session, 0)


def test_reused_keys_and_values_are_refused() -> None:
    case = trained("reference")
    refused = pytest.raises(vp.UnsupportedModelError, match="VLACache reuses keys and values")
    with vp.VLACache(keep=0.5, layer=1).attach(case.model) as session, refused:
        session.export(case.example(0))


@pytest.mark.parametrize("name", ["openvla-7b", "pi0", "llava", "paligemma", "qwen3-vl"])
def test_other_families_are_refused(name: str) -> None:
    policy = vp.random_policy(name)
    refused = pytest.raises(vp.UnsupportedModelError, match="cannot be exported; those of language models")
    with METHOD.attach(policy) as session, refused:
        session.export({})


@pytest.mark.parametrize("head", ["diffusion", None])
def test_other_heads_of_oft_are_refused(head: str | None) -> None:
    case = openvla_oft(head)
    with METHOD.attach(case.model) as session, pytest.raises(vp.UnsupportedModelError, match="cannot be exported"):
        session.export(case.example(0))


def test_examples_that_are_none_are_refused() -> None:
    lm, chunk, oft = decoder_lm(), trained("reference-chunk"), openvla_oft()
    for case, given, kind, says in (
        (lm, {}, vp.OptionError, "lacks inputs_embeds; give inputs_embeds"),
        (lm, {**lm.example(0), "mask": 1}, vp.OptionError, "has mask"),
        (lm, {**lm.example(0), "tokens": 0}, vp.OptionError, "tokens=0 was given"),
        (lm, {"inputs_embeds": torch.zeros(1, 9, 32)}, vp.OptionError, r"of the shape \(1, 9, 32\)"),
        (lm, {"inputs_embeds": "a"}, vp.OptionError, "inputs_embeds of the example is"),
        (chunk, {"images": chunk.example(0)["images"]}, vp.OptionError, "lacks instruction, proprio"),
        (chunk, {**chunk.example(0), "proprio": [1.0]}, vp.VLAPrunerError, "Proprio must have shape"),
        (oft, {**oft.example(0), "proprio": torch.zeros(3)}, vp.VLAPrunerError, "proprio must have the shape"),
        (oft, [], vp.OptionError, "give a mapping with input_ids, pixel_values, proprio"),
    ):
        with METHOD.attach(case.model, **case.options) as session, pytest.raises(kind, match=says):
            session.export(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [None, 3, "prompt", [torch.ones(1, 31, 32)], torch.ones(1, 31, 32)])
@pytest.mark.parametrize("name", ["decoder_lm", "reference"])
def test_an_example_is_a_mapping(name: str, example: Any) -> None:
    case = CASES[name]()
    with METHOD.attach(case.model, **case.options) as session, pytest.raises(vp.OptionError, match="give a mapping"):
        session.export(example)


@pytest.mark.parametrize(
    "prompt",
    [torch.ones(1, 31, 7), torch.ones(0, 31, 32), torch.ones(1, 31, 32).long(), torch.ones(1, 31, 32) * 1j],
)
def test_embeddings_that_no_prompt_of_the_model_has_are_refused(prompt: Tensor) -> None:
    """Embeddings of another width or type are refused as such: the error does not blame the method."""
    case, says = decoder_lm(), r"prompt of floats \(B, N, 32\)"
    with METHOD.attach(case.model, **case.options) as session, pytest.raises(vp.OptionError, match=says):
        session.export({"inputs_embeds": prompt})


def test_a_history_is_one_of_the_program() -> None:
    case, step = exported("decoder_lm")
    with METHOD.attach(case.model, **case.options) as session:
        for pruned in ("no", None, 1):
            with pytest.raises(vp.OptionError, match="pruned="):
                session.export(case.example(0), pruned=pruned)  # type: ignore[arg-type]
        assert session.memory is None
        for name, value in step.history(session.memory).items():
            assert torch.equal(value, step.start()[name])
    for rows, window, tokens in ((1, 2, 24), (2, 3, 24), (2, 2, 23)):
        with pytest.raises(vp.SessionError, match="'action' has the shape"):
            step.history(Memory.empty(rows, window, tokens))
    with pytest.raises(vp.SessionError, match="history was given a dict"):
        step.history({})  # type: ignore[arg-type]
    for outputs in ({}, {"next_history_age": torch.ones(1)}, None):
        with pytest.raises(vp.SessionError, match="no next_history_action"):
            step.next(outputs)  # type: ignore[arg-type]


def test_sessions_that_are_compiled_or_detached_are_refused() -> None:
    case = decoder_lm()
    with METHOD.attach(case.model, **case.options) as session:
        session.compile("eager")
        with pytest.raises(vp.SessionError, match="This session is compiled; export"):
            session.export(case.example(0))
    with pytest.raises(vp.SessionError, match="detached"):
        session.export(case.example(0))


@pytest.mark.parametrize("name", CASES)
def test_onnx_agrees(name: str, tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install '.[export]'")
    case, step = exported(name)
    with METHOD.attach(case.model, **case.options) as session:
        for scene in range(2):
            by_session(case, session, scene)
        step.save_onnx(tmp_path / "step.onnx")
        loaded = runtime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
        assert [one.name for one in loaded.get_inputs()] == list(step.inputs)
        assert [one.name for one in loaded.get_outputs()] == list(step.outputs)
        for scene in (2, 3):
            assert session.memory is not None
            given = {**inputs_of(case, session, scene), **step.history(session.memory)}
            expected = by_session(case, session, scene)
            values = loaded.run(None, {name: value.numpy() for name, value in given.items()})
            found = {name: torch.from_numpy(value) for name, value in zip(step.outputs, values, strict=True)}
            torch.testing.assert_close(found[output_of(step)], expected, rtol=1e-4, atol=1e-4)
            assert session.kept is not None
            assert torch.equal(found["kept"], session.kept)
            assert session.memory is not None
            for key, value in step.history(session.memory).items():
                torch.testing.assert_close(step.next(found)[key], value, rtol=1e-4, atol=1e-4)


def test_without_onnx_it_says_what_to_install(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, step = exported("decoder_lm")
    monkeypatch.setattr("vla_pruner.attach.exported.find_spec", lambda name: None)
    with pytest.raises(
        vp.UnsupportedModelError, match=r"install onnx and onnxscript: pip install 'vla-pruner\[export\]'"
    ):
        step.save_onnx(tmp_path / "step.onnx")
