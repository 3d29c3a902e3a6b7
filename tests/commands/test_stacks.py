"""Models with several stacks on the command line: naming one, cutting it, and what travels with the smaller model."""

import json
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tools.sweep.shrink import small_model

from avss.models.shards import find_stack_path
from avss.record import RunRecord
from tests.commands.test_bad_input import refused
from tests.support.tokenizers import VOCABULARY, word_tokenizer


def save(class_name: str, model_type: str, folder: Path, **settings: object) -> Path:
    small_model(getattr(transformers, class_name), model_type, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save("T5ForConditionalGeneration", "t5", tmp_path_factory.mktemp("models") / "t5", num_decoder_layers=3)
    word_tokenizer(adds="cls").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save("ViTForImageClassification", "vit", tmp_path_factory.mktemp("models") / "vit")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor", "size": 16}')
    return folder


def test_inspect_lists_every_stack_and_says_why_one_was_taken(avss_command, t5_folder):
    answer = avss_command("inspect", t5_folder)
    assert answer.code == 0
    for text in (
        "encoder.block",
        "decoder.block",
        "num_decoder_layers",
        "the decoder of an encoder-decoder",
        "--stack",
    ):
        assert text in answer.out
    raw = json.loads(avss_command("inspect", t5_folder, "--stack", "encoder", "--json").out)
    assert raw["model"]["stack"] == "encoder.block"
    assert [found["name"] for found in raw["stacks"]] == ["encoder", "decoder"]
    assert [change["field"] for change in raw["changes"]] == ["num_layers"]


def test_prune_cuts_the_stack_that_is_named(avss_command, t5_folder, text_file, tmp_path):
    out = tmp_path / "smaller"
    size = ("--count", "2", "--samples", "4", "--seq-len", "16", "--protect", "none", "--data", text_file)
    answer = avss_command("prune", t5_folder, "--stack", "encoder", *size, "--out", out)
    assert answer.code == 0, answer.err
    assert "Verified" in answer.out
    assert "cached = uncached generation" in answer.out
    config = json.loads((out / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 3)
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained(out).config.num_layers == 3


def test_a_search_of_one_stack_says_nothing_of_another(avss_command, t5_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("AVSS_CACHE", str(tmp_path / "cache"))
    text = ("--samples", "4", "--seq-len", "16", "--data", text_file, "--quiet")
    search = ("--select", "greedy", "--count", "1", "--protect", "none", *text)
    points = {}
    for name, words in (("encoder", ()), ("decoder", ()), ("again", ("--no-resume",))):
        out, stack = tmp_path / name, "decoder" if name == "again" else name
        answer = avss_command("prune", t5_folder, "--stack", stack, *search, *words, "--out", out)
        assert answer.code == 0, answer.err
        points[name] = RunRecord.read(out).search.points
    assert points["decoder"] == points["again"]
    assert points["decoder"] != points["encoder"]
    cut = ("--count", "1", "--stack", "decoder", "--out", tmp_path / "x", "--quiet")
    refused(avss_command("prune", t5_folder, "--from-search", tmp_path / "encoder", *cut), "`encoder.block`", "--stack")
    assert avss_command("prune", t5_folder, "--from-search", tmp_path / "decoder", *cut).code == 0


def test_an_unknown_stack_is_refused_with_the_names(avss_command, t5_folder, tmp_path):
    answer = avss_command("prune", t5_folder, "--stack", "vision", "--blocks", "0", "--out", tmp_path / "x")
    assert answer.code == 2
    assert "Unknown stack `vision`" in answer.err
    assert "decoder, decoder.block, encoder, encoder.block" in answer.err
    assert not (tmp_path / "x").exists()


def test_a_vision_encoder_is_cut_and_its_image_processor_travels(avss_command, vit_folder, tmp_path):
    out = tmp_path / "smaller"
    answer = avss_command("prune", vit_folder, "--blocks", "0,3", "--out", out)
    assert answer.code == 0, answer.err
    assert "Verified" in answer.out
    assert (out / "preprocessor_config.json").read_text() == (vit_folder / "preprocessor_config.json").read_text()
    assert transformers.AutoModelForImageClassification.from_pretrained(out).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("class_name", "model_type", "stack"),
    [
        ("ViTForImageClassification", "vit", "auto"),
        ("Dinov2Model", "dinov2", "auto"),
        ("CLIPModel", "clip", "vision"),
        ("LlavaForConditionalGeneration", "llava", "vision"),
        ("WhisperForConditionalGeneration", "whisper", "encoder"),
        ("WhisperForConditionalGeneration", "whisper", "decoder"),
        ("Wav2Vec2ForCTC", "wav2vec2", "auto"),
        ("SpeechT5ForSpeechToText", "speecht5", "encoder"),
    ],
)
def test_a_cut_of_what_reads_images_or_sound_is_verified_on_these(
    avss_command, tmp_path, class_name, model_type, stack
):
    """The whole proof, and that it is one: a kept block that is changed afterwards is noticed twice."""
    folder, out = save(class_name, model_type, tmp_path / "whole"), tmp_path / "smaller"
    answer = avss_command("prune", folder, "--stack", stack, "--blocks", "1", "--out", out, "--quiet")
    assert answer.code == 0, answer.err
    answer = avss_command("verify", out, "--against", folder, "--json")
    assert answer.code == 0, answer.out + answer.err
    checks = {check["what"]: check["passed"] for check in json.loads(answer.out)["checks"]}
    same = (
        "The weights it kept are those of the original, byte for byte",
        "Its outputs are those of the original with the removed blocks bypassed",
    )
    assert [checks[what] for what in same] == [True, True]
    weights = load_file(out / "model.safetensors")
    cut = RunRecord.read(out).cuts[0]
    path = find_stack_path(list(weights), len(cut.plan.kept), cut.model.stack)
    name = next(name for name in weights if name.startswith(f"{path}.1.") and weights[name].dim() == 2)
    save_file(weights | {name: 2 * weights[name] + 0.1}, out / "model.safetensors", metadata={"format": "pt"})
    answer = avss_command("verify", out, "--against", folder, "--json")
    assert answer.code == 1
    checks = {check["what"]: check["passed"] for check in json.loads(answer.out)["checks"]}
    assert [checks[what] for what in same] == [False, False]


@pytest.mark.parametrize(
    ("class_name", "model_type", "stack"),
    [("T5ForConditionalGeneration", "t5", "encoder"), ("CLIPModel", "clip", "vision")],
)
def test_without_a_record_the_stack_that_was_cut_is_found_by_its_length(
    avss_command, tmp_path, class_name, model_type, stack
):
    folder, out = save(class_name, model_type, tmp_path / "whole"), tmp_path / "smaller"
    answer = avss_command("prune", folder, "--stack", stack, "--blocks", "1,2", "--out", out, "--quiet")
    assert answer.code == 0, answer.err
    (out / "record.json").unlink()
    answer = avss_command("verify", out, "--against", folder, "--json")
    assert answer.code == 0, answer.out + answer.err
    found = json.loads(answer.out)
    assert found["plan"]["removed"] == [1, 2]
    assert {check["what"]: check["passed"] for check in found["checks"]}[
        "Its outputs are those of the original with the removed blocks bypassed"
    ]


def test_planning_leaves_out_what_the_architecture_cannot_lose(avss_command, text_file, tmp_path):
    folder = save("ModernBertForMaskedLM", "modernbert", tmp_path / "modernbert")
    word_tokenizer(adds="cls").save_pretrained(folder)
    size = ("--count", "2", "--samples", "4", "--seq-len", "16", "--protect", "none", "--criterion", "first")
    answer = avss_command("prune", folder, *size, "--data", text_file, "--out", tmp_path / "smaller")
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "smaller" / "record.json").read_text())
    assert record["cuts"][0]["plan"]["removed"] == [1, 2]
    assert "Block 0 cannot go" in avss_command("inspect", folder).out
    refused = avss_command("prune", folder, "--blocks", "0", "--out", tmp_path / "x")
    assert refused.code == 2
    assert "Block 0 of a `modernbert` model cannot be removed" in refused.err


# --- later steps remember which stack was cut ---


@pytest.fixture(scope="module")
def bart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier over an encoder-decoder, with stacks of different lengths: mixed up, they could not go unnoticed."""
    folder = tmp_path_factory.mktemp("models") / "bart"
    ends = VOCABULARY["[SEP]"]  # its head reads the last place of this token
    save("BartForSequenceClassification", "bart", folder, encoder_layers=5, decoder_layers=3, eos_token_id=ends)
    word_tokenizer(adds="cls").save_pretrained(folder)
    return folder


def cut_encoder(avss_command, folder: Path, out: Path) -> Path:
    answer = avss_command("prune", folder, "--stack", "encoder", "--blocks", "1,2", "--out", out, "--quiet")
    assert answer.code == 0, answer.err
    return out


@pytest.mark.parametrize("named", [True, False], ids=["against", "by the record"])
def test_a_cut_of_the_encoder_is_verified_as_one(avss_command, t5_folder, tmp_path, named):
    out = cut_encoder(avss_command, t5_folder, t5_folder.parent / f"smaller-{named}")
    answer = avss_command("verify", out, *(("--against", t5_folder) if named else ()), "--json")
    assert answer.code == 0, answer.out
    checks = {check["what"]: check["passed"] for check in json.loads(answer.out)["checks"]}
    assert checks["The weights it kept are those of the original, byte for byte"]
    assert checks["Its outputs are those of the original with the removed blocks bypassed"]


def test_a_cut_of_the_encoder_is_healed_as_one(avss_command, bart_folder, text_file, review_file, tmp_path):
    out = cut_encoder(avss_command, bart_folder, tmp_path / "smaller")
    small = ("--budget", "300 tokens", "--seq-len", 12, "--batch-size", 4, "--validations", 1, "--precision", "float32")
    answer = avss_command(
        "heal", out, "--teacher", bart_folder, "--data", text_file, "--out", tmp_path / "healed", *small
    )
    assert answer.code == 0, answer.err
    cut = json.loads((tmp_path / "healed" / "record.json").read_text())["cuts"][0]
    assert cut["model"]["stack"] == "model.encoder.layers"
    assert cut["verification"]["of_raw_cut"]
    task = f"classification={review_file}"
    again = avss_command("evaluate", tmp_path / "healed", "--baseline", bart_folder, "--task", task, "--json")
    assert again.code == 0, again.err
    found = json.loads(again.out)["cuts"][0]
    assert (found["model"]["stack"], found["plan"]["removed"]) == ("model.encoder.layers", [1, 2])


def test_a_run_heals_the_stack_it_cut(bart_folder, text_file, review_file, tmp_path, monkeypatch):
    import avss
    from avss.config import RunConfig
    from avss.healing import pair as room

    shells, real = [], room.with_blocks
    monkeypatch.setattr(room, "with_blocks", lambda *call: shells.append(call[1].path) or real(*call))
    config = RunConfig.model_validate(
        {
            "model": {"source": str(bart_folder), "stack": "encoder"},
            "data": {"source": str(text_file), "samples": 4, "seq_len": 12},
            "plan": {"count": 2, "protect": "none", "criterion": "first"},
            "criteria": ["first"],
            "tasks": [{"kind": "classification", "data": str(review_file)}],
            "heal": {"source": str(text_file), "budget": "300 tokens", "seq_len": 12, "validations": 1},
            "out": str(tmp_path / "out"),
        }
    )
    record = avss.run(config)
    assert shells == ["model.encoder.layers"]
    assert record.cuts[0].healing.after.loss <= record.cuts[0].healing.before.loss


@pytest.mark.parametrize("settings", [{"on_disk": True}, {"max_memory": "1MB"}])
def test_a_named_stack_is_cut_in_memory_or_not_at_all(t5_folder, tmp_path, settings):
    import avss

    with pytest.raises(avss.errors.ConfigError, match=r"`--stack` works in memory only"):
        avss.prune(str(t5_folder), blocks=[1], stack="encoder", out=tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


def test_a_classifier_over_an_encoder_decoder_is_verified(avss_command, bart_folder, tmp_path):
    out = cut_encoder(avss_command, bart_folder, tmp_path / "smaller")
    answer = avss_command("verify", out, "--against", bart_folder)
    assert answer.code == 0, answer.out


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_encoder_decoder_is_repaired_and_healed(avss_command, t5_folder, text_file, tmp_path, stack):
    text, out, healed = ("--data", text_file, "--seq-len", 12), tmp_path / "out", tmp_path / "healed"
    chosen = ("--stack", stack, "--blocks", "1", "--compensate", "refit", "--samples", 24)
    answer = avss_command("prune", t5_folder, *chosen, *text, "--out", out)
    assert answer.code == 0, answer.err
    small = ("--budget", "300 tokens", "--validations", 1, "--precision", "float32")
    answer = avss_command("heal", out, "--teacher", t5_folder, *text, *small, "--out", healed)
    assert answer.code == 0, answer.err
    healing = json.loads((healed / "record.json").read_text())["cuts"][0]["healing"]
    assert "next-token predictions" in healing["objective"]
    assert avss_command("verify", healed, "--against", t5_folder).code == 0
