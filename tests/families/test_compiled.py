"""Compiled sessions in every family: the same steps, and no graph after the first episode."""

from __future__ import annotations

from shutil import which

import pytest
import torch
from torch._dynamo.utils import counters

import vla_pruner as vp
from tests.families import cases, matrix, text_decoders, vlms
from tests.families.compiled import assert_same, check_family, drive, graphs, record
from tests.state import whole_state
from vla_pruner.attach.family import Call

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

SHALLOW = {"num_hidden_layers": 3}
"""Each layer is traced on its own: one before the pruning layer, and one after it."""
FAMILIES = {
    "reference": (cases.small_reference, "drop"),
    "chunk": (cases.small_chunk, "freeze"),
    "openvla": (lambda: cases.openvla("sdpa", **SHALLOW), "freeze"),
    "oft": (lambda: cases.openvla_oft("l1", "eager", **SHALLOW), "freeze"),
    "oft, discrete": (lambda: cases.openvla_oft(None, **SHALLOW), "drop"),
    "oft, diffusion": (lambda: cases.openvla_oft("diffusion", **SHALLOW), "drop"),
    "pi0": (lambda: cases.pi0("sdpa", layers=3), "freeze"),
    "Qwen3-VL": (lambda: text_decoders.text_decoder("qwen3_vl_text", layers=3), "freeze"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_uncompiled_and_no_graph_after_the_first_episode(name):
    build, pruned = FAMILIES[name]
    check_family(build(), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned, preset=matrix.PRESET[pruned]))


WHOLE = {
    "drop": vp.VLAPruner(keep=0.25, layer=1, window=2, warmup="semantic", preset="paper"),
    "freeze": vp.VLAPruner(keep=0.25, layer=1, window=1, pruned="freeze"),
    "before": vp.VLAPruner(keep=0.25, layer=0, window=1, refresh_every=2, preset="paper"),
    "before, frozen": vp.VLAPruner(keep=0.25, layer=0, window=1, pruned="freeze", refresh_every=2),
    "action": vp.ActionOnly(keep=0.25, layer=1, window=1),
    "fastv": vp.FastV(keep=0.25, layer=1),
    "diverse": vp.DivPrune(keep=0.25),
    "unlike": vp.DART(keep=0.25, layer=1),
    "relevant": vp.CDPruner(keep=0.25, layer=0),
    "random": vp.RandomKeep(keep=0.25, layer=1, warmup_steps=1),
    "gate": vp.TextQuery(keep=0.25, layer=1, gate=2),
    "camera": vp.ActionOnly(keep={"image": 9}, layer=1, window=1, unseen="carry"),
    "progressive": vp.SparseVLM(keep=0.75, layer=1, then=((2, 0.5), (3, 0.125))),
}


PASS = {
    **{name: WHOLE[name] for name in ("drop", "freeze", "before", "progressive")},
    "each camera": vp.VLAPruner(keep=0.25, layer=1, window=1, per_camera=True, preset="paper"),
    "cameras": vp.ActionOnly(keep={"image": 9, "wrist_image": 5}, layer=1, window=1, unseen="carry"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_control_step_as_one_program(name):
    """The autoregressive policy's: prompt and decoding in one graph, whatever is done in it and between steps."""
    check_whole(cases.small_reference(), WHOLE[name])


@pytest.mark.parametrize("name", PASS)
def test_a_whole_pass_of_the_two_camera_policy_as_one_program(name):
    check_whole(cases.small_chunk(), PASS[name])


def check_whole(case, method):
    model = case.build()
    before = whole_state(model)

    def step(scene):
        return case.step(model, scene, matrix.BOTH)

    def stays():
        made = graphs()
        assert made

        def check():
            assert graphs() == made

        return check

    with method.attach(model) as session:
        expected = drive(session, step)
    with method.attach(model) as session:
        session.compile("eager")
        counters.clear()
        actual = drive(session, step, after_first=stays)
    assert_same(actual, expected)
    assert any(one.kept is not None for one in actual[:4]), "it must prune, or this test could not fail"
    assert whole_state(model) == before


def test_batches_of_other_sizes_and_direct_calls_between_whole_control_steps():
    case = cases.small_reference()
    model = case.build()
    kinds = (matrix.BOTH, slice(0, 1), "direct", matrix.BOTH)
    found = []
    for compiled in (False, True):
        records = []
        with vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper").attach(model) as session:
            if compiled:
                session.compile("eager")
            for kind in kinds:
                session.reset()
                if kind == "direct":
                    with torch.inference_mode():
                        type(model).decode(model, prompts(model))
                    continue
                records += [record(session, case.step(model, scene, kind)) for scene in range(2)]
        found.append(records)
    assert_same(*found)


def prompts(model):
    """Embeddings of two prompts."""
    return torch.randn(
        2, model.config.prompt_length, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )


def test_a_policy_that_is_moved_has_programs_of_its_own():
    case = cases.small_reference()
    model = case.build()
    for made in (vp.compiled(model, "eager"), vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")):
        if isinstance(made, vp.Method):
            made = made.attach(model)
            made.compile("eager")
        with made:
            case.step(model, 0, matrix.BOTH)
            model.double()
            case.step(model, 0, matrix.BOTH)
            model.float()
            case.step(model, 0, matrix.BOTH)


def test_numbers_of_another_kind_make_no_graph():
    case = cases.small_reference()
    model = case.build()
    size, body = model.config.image_size, model.proprio_size
    frames = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    with vp.compiled(model, "eager"):
        counters.clear()
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for images in (frames, frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
                model.predict_action(images, model.instructions[0], torch.zeros(2, body, dtype=dtype))
        assert graphs() == 2
        expected = model.decode(prompts(model))
        assert torch.equal(model.decode(prompt=prompts(model)), expected)


def test_what_others_compile_meanwhile_changes_no_step():
    """torch reports for the whole process that it is compiling, whichever thread compiles."""
    case = cases.small_reference()
    model = case.build()
    method = vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper")
    with method.attach(model) as session, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        steps = [session._runner.open_call(Call(model.config.prompt_length, None, 2, model.device)) for _ in range(2)]
    assert steps == [True, True]


def test_parts_of_a_compiled_policy_are_compiled_already():
    case = cases.small_reference()
    model = case.build()
    with vp.compiled(model, "eager"), pytest.raises(vp.UnsupportedModelError, match="compiled already"):
        vp.FastV(keep=0.25, layer=1).attach(model.language_model, visual=model.config.visual)
    vp.FastV(keep=0.25, layer=1).attach(model.language_model, visual=model.config.visual).detach()


def test_a_layer_that_nobody_named_is_pruned_at():
    """The published layer is an int of its own type, which compiled code would not find in a dict of layers."""
    for case in (cases.small_reference(), cases.pi0("sdpa", layers=4), cases.small_chunk()):
        model = case.build()
        with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(model) as session:
            case.step(model, 0, matrix.BOTH)  # the history; programs of unpruned steps would show nothing here
            session.compile("eager")
            case.step(model, 1, matrix.BOTH)
            assert session.kept is not None, case
            assert session._runner.compiled is not None
            assert session._runner.compiled.programs > 0
            assert type(session.method.layer) is int


def test_a_whole_control_step_is_two_programs_and_a_third_when_it_is_pruned():
    case = cases.small_reference()
    model = case.build()
    with vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper").attach(model) as session:
        session.compile("eager")
        found = []
        for scene in range(3):
            case.step(model, scene, matrix.BOTH)
            assert session._runner.compiled is not None
            found.append(session._runner.compiled.programs)
    assert found == [2, 3, 3]


def test_keep_all_of_a_whole_control_step_is_the_compiled_policy_to_the_bit():
    case = cases.small_reference()
    model = case.build()
    with vp.compiled(model, "eager"):
        untouched = [case.step(model, scene, matrix.BOTH) for scene in range(3)]
        with pytest.raises(vp.UnsupportedModelError, match="compiled already"):
            vp.FastV(keep=0.5).attach(model)
    with vp.VLAPruner(keep=1.0, layer=1, window=1, preset="paper").attach(model) as session:
        session.compile("eager")
        assert all(torch.equal(case.step(model, scene, matrix.BOTH), untouched[scene]) for scene in range(3))


def test_a_whole_control_step_that_fails_leaves_the_memory_as_it_was():
    case = cases.small_reference()
    model = case.build()
    with vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper").attach(model) as session:
        session.compile("eager")
        case.step(model, 0, matrix.BOTH)
        before = session.memory
        undisturbed = record(session, case.step(model, 1, matrix.BOTH))
        session.memory = before
        norm = model.language_model.model.norm
        weight, norm.weight = norm.weight, torch.nn.Parameter(torch.ones(3))
        with pytest.raises(RuntimeError):
            case.step(model, 1, matrix.BOTH)
        norm.weight = weight
        after = session.memory
        assert before is not None
        assert after is not None
        for name, value in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[name], value, equal_nan=True)
        assert_same([record(session, case.step(model, 1, matrix.BOTH))], [undisturbed])


def test_a_vlm_that_adds_to_its_visual_tokens_between_layers():
    """DeepStack picks rows by a mask, which a graph cannot: it is done at fixed sizes, unpruned and pruned."""
    check_family(vlms.case("qwen3_vl"), vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper"))


def test_denoising_steps_are_one_program():
    case = cases.pi0("sdpa", layers=4)
    model = case.build()
    with vp.FastV(keep=0.25).attach(model) as session:
        session.compile("eager")
        case.step(model, 0, matrix.BOTH)
        assert session._runner.compiled is not None
        # The vision tower, the prompt, and one for all denoising steps.
        assert session._runner.compiled.programs == 3


def test_a_prompt_without_text_is_refused_in_our_words():
    case = cases.pi0("sdpa", layers=4)
    model = case.build()
    call = model.sample_actions

    def without_text(**given):
        given["attention_mask"][:, 32:] = 0
        return call(**given)

    with vp.FastV(keep=0.25, layer=1, semantic_queries="text").attach(model) as session:
        session.compile("eager")
        model.sample_actions = without_text
        with pytest.raises(vp.SessionError, match="no text after its last visual token"):
            case.step(model, 0, matrix.BOTH)
        del model.sample_actions
        case.step(model, 1, matrix.BOTH)


@pytest.mark.skipif(which("g++") is None, reason="no C++ compiler")
def test_inductor_computes_the_same():
    """The one test that runs the compiler itself."""
    from tests.attach.tiny import VISUAL, decode, prompt, tiny_lm

    model = tiny_lm(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    method = vp.MaxMinDiversity(keep=0.25, layer=1)

    def steps():
        return [decode(model, prompt(1, seed=s)[0][..., :16], None, None, 2)[1] for s in range(2)]

    with method.attach(model, visual=VISUAL):
        expected = steps()
    with method.attach(model, visual=VISUAL) as session:
        session.compile()
        counters.clear()
        actual = steps()
        made = counters["stats"]["unique_graphs"]
        session.reset()
        again = steps()
        assert counters["stats"]["unique_graphs"] == made
    for one, two, other in zip(actual, again, expected, strict=True):
        assert (one - other).abs().max() < 1e-4
        assert torch.equal(one, two)
