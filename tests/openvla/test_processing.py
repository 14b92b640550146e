"""Pixels against the official processor's, and prompts through a small tokenizer of Llama's kind."""

import builtins
import json
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from vla_pruner.errors import CheckpointError, ObservationError, UnsupportedModelError
from vla_pruner.models.openvla import load_openvla
from vla_pruner.models.openvla.processing import PUBLISHED_IMAGE_CONFIG, OpenVLAProcessor, StandInTokenizer
from vla_pruner.models.openvla.tokenizer import read_tokenizer
from vla_pruner.preprocessing.libero import libero_image

WORDS = ["▁In", "▁What", "▁action", "▁pick"]
PROMPT = "In: What action should the robot take to pick up the bowl?\nOut:"


@pytest.fixture
def processor():
    return OpenVLAProcessor(PUBLISHED_IMAGE_CONFIG, StandInTokenizer(300))


def write_tokenizer(folder):
    """Write a tokenizer.json of Llama 2's structure: pieces that start with ▁, merges, bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({*"".join(WORDS), *PROMPT.replace(" ", "").replace("\n", "")})
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merge = (word[: end - 1], word[end - 1])
            if merge not in merges:
                merges.append(merge)
                pieces.append(word[:end])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<PAD>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "pad_token": {"content": "<PAD>"}, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # The file beside it in a published folder that makes AutoTokenizer ask for trust in remote code.
    remote = {"model_type": "openvla", "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}}
    (folder / "config.json").write_text(json.dumps(remote))
    return {**vocabulary, "<PAD>": len(vocabulary)}


def read_fast(folder) -> Any:
    return read_tokenizer(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED_IMAGE_CONFIG))
    return tmp_path


def test_pixels_are_the_official_ones(golden):
    expected = np.load(golden / "openvla_tiny" / "golden.npz")
    processor = OpenVLAProcessor.from_folder(golden / "openvla_tiny", StandInTokenizer(300))
    found = processor.pixel_values([expected["images"][:1]])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected["pixel_values_t0"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("crop", "name"), [(True, "crop224"), (False, "lanczos224")])
def test_from_the_simulators_image_to_the_official_action(golden, crop, name):
    for codec in ("simplejpeg", "PIL"):
        pytest.importorskip(codec, reason="LIBERO's JPEG stage needs pillow and simplejpeg (extra libero-images)")
    expected = np.load(golden / "openvla_tiny" / "golden.npz")
    simulated = np.load(golden / "libero_preprocess" / "golden.npz")["full_rot256"][::-1, ::-1]
    policy = load_openvla(golden / "openvla_tiny")
    pixels = policy.processor.pixel_values([libero_image(simulated, center_crop=crop)])
    found = policy.predict_action(torch.from_numpy(expected["input_ids"]), pixel_values=pixels)
    np.testing.assert_allclose(found, expected[f"actions_libero_{name}_t0"], rtol=0, atol=1e-6)


def test_the_published_constants_are_the_golden_ones(golden):
    config = json.loads((golden / "openvla_tiny" / "preprocessor_config.json").read_text())
    assert {name: config[name] for name in PUBLISHED_IMAGE_CONFIG} == PUBLISHED_IMAGE_CONFIG


def test_cameras_are_joined_along_channels_and_rows_stay_apart(processor):
    random = np.random.default_rng(0)
    front = random.integers(0, 256, (2, 240, 320, 3), dtype=np.uint8)
    wrist = random.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    found = processor.pixel_values([front, wrist])
    assert found.shape == (2, 12, 224, 224)
    for row in range(2):
        torch.testing.assert_close(found[row, :6], processor.pixel_values([front[row]])[0], rtol=0, atol=0)
        torch.testing.assert_close(found[row, 6:], processor.pixel_values([wrist[row]])[0], rtol=0, atol=0)


def test_channels_are_dino_then_siglip_by_the_effective_constants():
    config = {**PUBLISHED_IMAGE_CONFIG, "means": [[0.485, 0.456, 0.406], [0.5] * 3], "stds": [[0.229] * 3, [0.5] * 3]}
    image = np.full((224, 224, 3), (255, 0, 51), np.uint8)
    found = OpenVLAProcessor(config, StandInTokenizer(300)).pixel_values([image])[0, :, 7, 9]
    dino = [(1 - 0.484375) / 0.228515625, -0.455078125 / 0.2236328125, (0.2 - 0.40625) / 0.224609375]
    np.testing.assert_allclose(found, [*dino, 1.0, -1.0, -0.6], atol=1e-6)
    del config["tvf_normalize_params"]
    found = OpenVLAProcessor(config, StandInTokenizer(300)).pixel_values([image])[0, :, 7, 9]
    np.testing.assert_allclose(found[0], (1 - 0.485) / 0.229, atol=1e-6)


def test_pil_images_and_tensors_are_taken(processor):
    image_module = pytest.importorskip("PIL.Image", reason="makes a PIL image")
    image = np.random.default_rng(1).integers(0, 256, (250, 230, 3), dtype=np.uint8)
    expected = processor.pixel_values([image])
    assert torch.equal(processor.pixel_values([image_module.fromarray(image)]), expected)
    assert torch.equal(processor.pixel_values([torch.from_numpy(image)]), expected)
    assert torch.equal(processor.pixel_values([image_module.fromarray(image).convert("RGBA")]), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "There are no images"),
        ([np.zeros((8, 8, 3), np.float32)], r"found float32 \(8, 8, 3\)"),
        ([torch.zeros(8, 8, 3)], r"found torch.float32 \(8, 8, 3\)"),
        ([np.zeros((3, 8, 8), np.uint8)], r"found uint8 \(3, 8, 8\)"),
        ([np.zeros((0, 8, 8, 3), np.uint8)], r"found uint8 \(0, 8, 8, 3\)"),
        (["image.png"], "found str"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)], r"The cameras have \[2, 1\] images"),
    ],
)
def test_what_is_no_image_is_refused(processor, images, message):
    with pytest.raises(ObservationError, match=message):
        processor.pixel_values(images)


@pytest.mark.parametrize(
    "change",
    [
        {"image_resize_strategy": "letterbox"},
        {"image_resize_strategy": "resize-crop"},
        {"tvf_do_letterbox": True},
        {"interpolations": ["bicubic", "bilinear"]},
        {"input_sizes": [[3, 224, 224], [3, 384, 384]]},
        {"tvf_crop_params": [{"output_size": [200, 200]}] * 2},
        {"tvf_resize_params": [{"size": 224}] * 2},
        {"tvf_resize_params": [{"size": [224, 224], "antialias": False}] * 2},
    ],
)
def test_other_treatments_of_images_are_refused(change):
    with pytest.raises(UnsupportedModelError, match="Supported is the published checkpoints' 'resize-naive'"):
        OpenVLAProcessor({**PUBLISHED_IMAGE_CONFIG, **change}, StandInTokenizer(300))


def test_the_prompt_is_the_official_one(processor):
    assert processor.prompt("Pick up the Bowl") == PROMPT


def test_rows_start_with_bos_end_with_the_empty_token_and_are_padded_on_the_right(folder):
    ids = write_tokenizer(folder)
    processor = OpenVLAProcessor.from_folder(folder, pad_token_id=ids["<PAD>"])
    input_ids, mask = processor.tokenize([PROMPT, "In\né"])
    assert input_ids.dtype == mask.dtype == torch.int64
    # Tokens of "In:", a newline and an unknown letter as bytes, as Llama writes them.
    assert input_ids[0, :4].tolist() == [1, ids["▁In"], ids[":"], ids["▁What"]]
    assert ids["<0x0A>"] in input_ids[0]
    short = [1, ids["▁In"], ids["<0x0A>"], ids["<0xC3>"], ids["<0xA9>"], 29871]
    assert input_ids[1].tolist() == short + [ids["<PAD>"]] * (input_ids.shape[1] - len(short))
    assert mask.sum(1).tolist() == [input_ids.shape[1], len(short)]
    assert mask[1, : len(short)].all()
    assert input_ids[0, -1] == 29871
    assert read_fast(folder).decode(input_ids[0, 1:-1]).strip() == PROMPT


def test_bos_comes_once_also_where_the_file_adds_it(folder):
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    before = OpenVLAProcessor.from_folder(folder).tokenize([PROMPT])[0]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    processor = OpenVLAProcessor.from_folder(folder)
    assert read_fast(folder)(PROMPT)["input_ids"][0] == 1  # the file does add it
    assert torch.equal(processor.tokenize([PROMPT])[0], before)


def test_the_call_is_the_official_one(processor):
    image = np.random.default_rng(2).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    inputs = processor(PROMPT, image).to("cpu", dtype=torch.bfloat16)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["pixel_values"].shape == (1, 6, 224, 224)
    assert inputs["input_ids"].dtype == torch.int64
    with_empty, mask = processor.tokenize([PROMPT])
    assert torch.equal(inputs["input_ids"], with_empty[:, :-1])
    assert torch.equal(inputs["attention_mask"], mask[:, :-1])


def test_the_call_takes_a_batch_with_one_image_for_each_prompt(processor):
    images = np.random.default_rng(3).integers(0, 256, (2, 30, 30, 3), dtype=np.uint8)
    found = processor([PROMPT, "short"], list(images))
    assert torch.equal(found["pixel_values"], processor.pixel_values([images]))
    assert torch.equal(found["pixel_values"], processor([PROMPT, "short"], images)["pixel_values"])
    assert found["attention_mask"].sum(1).tolist() == [1 + len(PROMPT), 1 + len("short")]
    with pytest.raises(ObservationError, match="There are 1 prompts and 2 images"):
        processor(PROMPT, list(images))
    with pytest.raises(ObservationError, match="return_tensors='np' was given"):
        processor(PROMPT, images[0], return_tensors="np")
    with pytest.raises(ObservationError, match=r"found str\. Put the one prompt in a list"):
        processor.tokenize(PROMPT)
    for wrong in (None, 7, b"go"):
        with pytest.raises(ObservationError, match=f"An instruction is a string, .* found {type(wrong).__name__}"):
            processor.prompt(wrong)
        with pytest.raises(ObservationError, match=f"A prompt is a string, .* found {type(wrong).__name__}"):
            processor.tokenize([wrong])
        with pytest.raises(ObservationError, match=f"A prompt is a string, .* found {type(wrong).__name__}"):
            processor(wrong, images[0])
    for empty in ("", " \n"):
        with pytest.raises(ObservationError, match="The instruction is empty"):
            processor.prompt(empty)
    half = "go \udc80"
    with pytest.raises(ObservationError, match="An instruction's character 3 is half of one"):
        processor.prompt(half)
    with pytest.raises(ObservationError, match="A prompt's character 3 is half of one"):
        processor.tokenize([half])


def test_the_stand_in_writes_llamas_byte_tokens():
    tokenizer = StandInTokenizer(259)
    assert tokenizer("A\n")["input_ids"] == [1, 3 + 65, 3 + 10]
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [3 + 0xC3, 3 + 0xA9]
    with pytest.raises(ValueError, match="needs a vocabulary of 259; found 258"):
        StandInTokenizer(258)


def test_a_folder_without_its_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        OpenVLAProcessor.from_folder(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for content, message in [("{", "is damaged"), ("[]", "holds no settings"), ("{}", "has no input_sizes")]:
        path.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            OpenVLAProcessor.from_folder(tmp_path, StandInTokenizer(300))
    path.write_text(json.dumps(PUBLISHED_IMAGE_CONFIG))
    with pytest.raises(CheckpointError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        OpenVLAProcessor.from_folder(tmp_path)
    broken = {**PUBLISHED_IMAGE_CONFIG, "tvf_normalize_params": PUBLISHED_IMAGE_CONFIG["tvf_normalize_params"][:1]}
    with pytest.raises(CheckpointError, match="for 2 vision towers; each tower needs three of both"):
        OpenVLAProcessor(broken, StandInTokenizer(300))


def test_a_damaged_tokenizer_is_refused(folder):
    write_tokenizer(folder)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<begin>"}))
    with pytest.raises(CheckpointError, match="has no token '<begin>', which begins every prompt"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged"):
        read_tokenizer(folder)


def test_tokenizer_model_without_sentencepiece_names_the_pip_line(folder, monkeypatch):
    def refuse(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece")
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="`pip install sentencepiece`"):
        OpenVLAProcessor.from_folder(folder)


def test_tokenizer_model_is_read_by_sentencepiece(folder):
    sentencepiece = pytest.importorskip("sentencepiece", reason="tokenizer.model needs sentencepiece")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([PROMPT] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=290,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    processor = OpenVLAProcessor.from_folder(folder)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    input_ids, mask = processor.tokenize([PROMPT, "in"])
    assert input_ids[0].tolist() == [1, *pieces.Encode(PROMPT), 29871]
    assert mask[1].sum() == 2 + len(pieces.Encode("in"))
    (folder / "tokenizer.model").write_bytes(b"no pieces")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged"):
        read_tokenizer(folder)
