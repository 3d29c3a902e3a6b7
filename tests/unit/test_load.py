"""Models in, stock checkpoints out: the head, the dtype and the tokenizer stay what they were."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

import avss
from avss.ablation import Judge
from avss.collect import collect
from avss.compensation import compensate
from avss.composer.inspection import refuse_uncuttable
from avss.criteria import find_criteria
from avss.cut import cut
from avss.errors import AvssError, ConfigError, ModelLoadError
from avss.models.forward import run_outputs
from avss.models.load import Loaded, _model_class, adopt, fingerprint, in_dtype, load_model, save_model
from avss.models.rewrite import config_changes
from avss.models.verify import verify
from avss.record import Plan
from tests.laws.test_every_architecture import tiny
from tests.support.architectures import ARCHITECTURES, POSITIONS, VOCAB, randomise, stored, token_batch
from tests.support.oracles import run
from tests.support.tokenizers import VOCABULARY, word_tokenizer


def saved(model: PreTrainedModel, folder: Path, *, tokenizer: bool = False) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(ARCHITECTURES["llama"](), tmp_path / "tiny-llama", tokenizer=True)


def without(loaded: Loaded, *removed: int) -> tuple[Loaded, Plan]:
    plan = Plan(num_blocks=len(loaded.stack), removed=removed, method="explicit", rule="by hand")
    return cut(loaded, plan), plan


# --- folders ---


def test_a_local_folder_loads_in_evaluation_mode_with_its_tokenizer(llama):
    loaded = load_model(llama, device="cpu")
    assert not loaded.model.training
    assert loaded.tokenizer("the cat")["input_ids"] == word_tokenizer()("the cat")["input_ids"]
    token_ids, keep = token_batch()
    assert torch.equal(run(loaded.model, token_ids, keep), run(stored("llama"), token_ids, keep))


def test_facts_tell_what_was_loaded(llama):
    facts = load_model(str(llama), device="cpu").facts()
    model = stored("llama")
    assert (facts.source, facts.revision) == ("tiny-llama", None)  # no path of this machine
    assert (facts.architecture, facts.model_type, facts.head) == ("LlamaForCausalLM", "llama", "causal")
    assert (facts.stack, facts.num_blocks, facts.hidden_size) == ("model.layers", 5, 32)
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.num_block_parameters == sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert facts.checkpoint_bytes == 4 * facts.num_parameters
    assert (facts.dtype, facts.compute_dtype, facts.device) == ("float32", "float32", "cpu")


def test_tied_parameters_count_once():
    model = stored("llama-tied")
    assert adopt(model).facts().num_parameters == sum(p.numel() for p in dict.fromkeys(model.parameters()))


def test_fingerprint_is_the_same_wherever_the_model_lies(tmp_path):
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    places = (tmp_path / "one", f"{tmp_path}/./one", tmp_path / "two")
    assert len({fingerprint(load_model(place).model) for place in places}) == 1


def test_fingerprint_follows_weights_and_config():
    base = fingerprint(ARCHITECTURES["llama"]())
    assert fingerprint(ARCHITECTURES["llama"]()) == base
    other_weights, other_config = randomise(ARCHITECTURES["llama"](), seed=1), ARCHITECTURES["llama"]()
    other_config.config.rms_norm_eps = 1e-3
    assert len({base, fingerprint(other_weights), fingerprint(other_config)}) == 3


def test_a_model_without_tokenizer_loads(tmp_path):
    loaded = load_model(saved(ARCHITECTURES["llama"](), tmp_path / "m"), device="cpu")
    assert loaded.tokenizer is None
    assert run_outputs(loaded, *token_batch()).shape == (3, 12, VOCAB)


def test_limits_come_from_model_and_tokenizer():
    assert adopt(stored("llama")).max_len == POSITIONS
    assert adopt(stored("roberta")).max_len == POSITIONS  # two positions of its table are reserved
    assert adopt(stored("llama")).vocabulary == VOCAB
    tokenizer = word_tokenizer()
    assert adopt(stored("llama"), tokenizer).max_len == POSITIONS
    tokenizer.model_max_length = 20
    assert adopt(stored("llama"), tokenizer).max_len == 20


@pytest.mark.parametrize("name", ["gpt2", "gpt2-classifier", "distilbert", "roberta", "llama", "electra-masked"])
def test_the_longest_sequence_passes_and_one_token_more_is_beyond_the_table(name):
    loaded = adopt(stored(name))
    assert run_outputs(loaded, *token_batch(1, loaded.max_len, padded=False)).isfinite().all()


@pytest.mark.parametrize("name", ["bert-classifier", "bert-masked", "bert-tokens", "distilbert", "gpt2-classifier"])
def test_the_class_named_in_the_config_keeps_its_head(name, tmp_path):
    model = ARCHITECTURES[name]()
    loaded = load_model(saved(model, tmp_path / "m"), device="cpu")
    assert type(loaded.model) is type(model)
    assert torch.equal(run_outputs(loaded, *token_batch()), run(model, *token_batch()))


def test_a_config_without_architectures_loads_by_its_type(tmp_path):
    for name, expected in (("bert-masked", "BertForMaskedLM"), ("llama", "LlamaForCausalLM")):
        folder = saved(ARCHITECTURES[name](), tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        assert type(load_model(folder, device="cpu").model).__name__ == expected


def test_a_stock_class_stays_itself_where_own_code_may_run(tmp_path):
    """`--trust-remote-code` is for models that bring code: a class without an auto head is not one of them."""
    folder = saved(ARCHITECTURES["bert-tokens"](), tmp_path / "m")
    loaded = load_model(folder, device="cpu", trust_remote_code=True)
    assert (type(loaded.model).__name__, loaded.head) == ("BertForTokenClassification", "other")


def test_a_class_with_its_own_code_and_any_name_loads_by_the_auto_class_it_names(tmp_path):
    """And a stock class whose repository brings code for it loads as itself where no auto class is named."""
    config = transformers.LlamaConfig(architectures=["MyOmniThing"])
    config.auto_map = {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.MyOmniThing"}
    assert _model_class(config, "auto", trust_remote_code=True) == (transformers.AutoModelForCausalLM, "other")
    config.architectures, config.auto_map = ["BertForTokenClassification"], {"AutoTokenizer": "m.T"}
    assert _model_class(config, "auto", trust_remote_code=True) == (transformers.BertForTokenClassification, "other")
    config.architectures = ["MyOmniThing"]
    with pytest.raises(ModelLoadError, match="`MyOmniThing` is not a class of transformers"):
        _model_class(config, "auto", trust_remote_code=False)


def test_a_model_over_several_devices_is_scored_and_not_cut(llama, monkeypatch):
    loaded = load_model(llama, device="cpu")
    plan = Plan(num_blocks=5, removed=(1,), method="explicit", rule="by hand")
    loaded.model.hf_device_map = {"": 0}
    cut(loaded, plan)
    loaded.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    for refused in (lambda: cut(loaded, plan), lambda: refuse_uncuttable(loaded)):
        with pytest.raises(ConfigError, match=r"spread over 0, 1.*--on-disk"):
            refused()


def test_a_device_without_float64_is_refused_where_that_is_needed(llama, monkeypatch):
    loaded = load_model(llama, device="cpu")
    batches = [(torch.tensor([[1, 2, 3]]), torch.ones((1, 3), dtype=torch.bool))]
    plan = Plan(num_blocks=5, removed=(1,), method="explicit", rule="by hand")
    smaller = cut(loaded, plan)
    monkeypatch.setattr(type(loaded), "device", torch.device("mps"))
    needs = find_criteria(["block-influence"])[0].needs
    for use in (
        lambda: collect(loaded, batches, needs),
        lambda: Judge(loaded, batches),
        lambda: compensate(loaded, smaller, plan, batches, method="refit"),
    ):
        with pytest.raises(ConfigError, match=r"float64.*--device cpu"):
            use()


def test_what_a_class_keeps_in_float32_is_stored_so(tmp_path):
    """The biases that route tokens to experts: loaded in float32 whatever the model's dtype, and so are they saved."""
    model = tiny("Glm4MoeForCausalLM", "glm4_moe", first_k_dense_replace=1)()
    biases = {name: value for name, value in model.state_dict().items() if "e_score_correction_bias" in name}
    assert biases
    half = in_dtype(model, torch.bfloat16)
    with torch.no_grad():
        for name, value in half.state_dict().items():
            if name in biases:
                value.copy_(30 + 0.02 * torch.randn(value.shape))
    half.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert all(stored[name].dtype == torch.float32 for name in biases)
    loaded = load_model(tmp_path / "model", device="cpu")
    assert (loaded.model.dtype, loaded.stored_dtype) == (torch.float32, torch.bfloat16)
    save_model(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: value.dtype for name, value in again.items()} == {name: value.dtype for name, value in stored.items()}
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    avss.prune(str(tmp_path / "model"), blocks="3", out=tmp_path / "out")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_model_over_all_devices_has_the_dtype_that_was_asked_for(tmp_path, dtype, expected):
    folder = saved(ARCHITECTURES["llama"]().to(torch.bfloat16), tmp_path / "m")
    loaded = load_model(folder, device="map", dtype=dtype)
    assert (loaded.model.dtype, loaded.stored_dtype) == (expected, torch.bfloat16)
    assert run_outputs(loaded, *token_batch()).isfinite().all()


def test_another_head_may_be_asked_for(llama):
    loaded = load_model(llama, head="encoder", device="cpu")
    assert (type(loaded.model).__name__, loaded.head, loaded.stack.path) == ("LlamaModel", "encoder", "layers")


def test_an_adopted_model_is_left_alone_but_for_evaluation_mode():
    model = ARCHITECTURES["llama"]().train()
    loaded = adopt(model)
    assert loaded.model is model
    assert not model.training
    assert loaded.facts().source == "LlamaForCausalLM"


# --- what cannot be loaded ---


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"head": "tail"}, ConfigError, "Unknown head `tail`"),
        ({"head": "casual"}, ConfigError, r"Unknown head `casual`\. Did you mean `causal`"),
        ({"dtype": "int8"}, ConfigError, "Unknown dtype `int8`"),
        ({"dtype": "float23"}, ConfigError, "Did you mean `float32`"),
        ({"device": "toaster"}, ConfigError, "device `toaster` is not there"),
        ({"device": "cuda:99"}, ConfigError, "device `cuda:99` is not there"),
        ({"device": ""}, ConfigError, "device `` is not there"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(settings, error, message):
    with pytest.raises(error, match=message):
        load_model("/no/such/model", **settings)


@pytest.mark.parametrize("source", ["/no/such/model", "./missing", "~/missing/of/avss", "a/b/c/d", "missing.gguf"])
def test_a_missing_path_is_a_model_error(source):
    with pytest.raises(ModelLoadError, match="There is no file or folder"):
        load_model(source)


def test_an_empty_name_is_a_model_error(tmp_path, monkeypatch):
    saved(ARCHITECTURES["llama"](), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="There is no file or folder"):
        load_model("")


def test_a_folder_without_a_model_is_a_model_error(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no `config.json` and no GGUF file"):
        load_model(tmp_path)


def test_a_folder_of_several_gguf_files_asks_which(tmp_path):
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"2 GGUF files: one\.gguf, two\.gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(range(256)) * 9])
def test_a_gguf_file_that_is_none_is_a_model_error(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match="does not begin with `GGUF`"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + b"\x03\x00\x00\x00" + bytes(range(1, 250))])
def test_a_damaged_gguf_file_is_a_model_error(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match="Cannot read the config"):
        load_model(tmp_path / "model.gguf")


def test_a_file_of_another_kind_is_a_model_error(llama):
    with pytest.raises(ModelLoadError, match=r"is a file, but not a `\.gguf` file"):
        load_model(llama / "model.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "unheard-of"}'])
def test_a_damaged_config_is_a_model_error(llama, content):
    (llama / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match="tiny-llama"):
        load_model(llama)


def test_missing_weights_are_a_model_error(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="Only safetensors and GGUF"):
        load_model(llama)


def test_truncated_weights_are_a_model_error(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match="is the download whole"):
        load_model(llama)


def test_pickled_weights_are_not_read(llama):
    (llama / "model.safetensors").unlink()
    torch.save(stored("llama").state_dict(), llama / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="Only safetensors and GGUF"):
        load_model(llama)


def test_an_unknown_architecture_is_a_model_error(llama):
    config = json.loads((llama / "config.json").read_text())
    config["architectures"] = ["LlamaForPoetry"]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"`LlamaForPoetry` is not a class of transformers.*`--head`"):
        load_model(llama)
    assert load_model(llama, head="causal", device="cpu").head == "causal"


def test_weights_that_lack_a_block_are_not_loaded_in_silence(llama):
    """A config that promises more blocks than there are weights would give random blocks."""
    config = json.loads((llama / "config.json").read_text())
    config["num_hidden_layers"] = 7
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError):
        load_model(llama, device="cpu")


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert-masked"])
def test_half_precision_computes_wide_on_a_cpu_and_is_saved_bit_for_bit(tmp_path, name, dtype):
    folder = saved(ARCHITECTURES[name]().to(dtype), tmp_path / "half")
    loaded = load_model(folder, device="cpu")
    assert loaded.model.dtype == torch.float32
    assert loaded.stored_dtype == dtype
    assert loaded.facts().checkpoint_bytes == 2 * loaded.facts().num_parameters
    save_model(loaded, tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(after[key].dtype == dtype and torch.equal(before[key], after[key]) for key in before)
    assert (folder / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert loaded.model.dtype == torch.float32


@pytest.mark.parametrize(("stored", "compute"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_a_half_that_does_not_hold_the_other_is_not_stored_as_it(tmp_path, stored, compute):
    folder = saved(ARCHITECTURES["llama"]().to(getattr(torch, stored)), tmp_path / "half")
    loaded = load_model(folder, dtype=compute, device="cpu")
    assert loaded.model.dtype == loaded.stored_dtype == getattr(torch, compute)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gpt2", "granite", "llama", "bert", "electra", "phi3"])
def test_widening_gives_what_transformers_would_compute_in_float32(tmp_path, name):
    """Constants that are no weights (embedding scales, frequencies) must not keep the rounding of a narrow load."""
    folder = saved(ARCHITECTURES[name]().bfloat16(), tmp_path / "half")
    loaded = load_model(folder, device="cpu")
    expected = type(stored(name)).from_pretrained(folder, dtype=torch.float32).eval()
    for buffer, value in expected.named_buffers():
        assert torch.equal(loaded.model.get_buffer(buffer), value), buffer
    assert torch.equal(run(loaded.model, *token_batch()), run(expected, *token_batch()))


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "distilbert-masked"])
def test_a_cut_of_a_half_precision_model_verifies_and_stays_half(tmp_path, name):
    folder = saved(ARCHITECTURES[name]().bfloat16(), tmp_path / "half")
    loaded = load_model(folder, device="cpu")
    smaller, plan = without(loaded, 1, 2)
    save_model(smaller, tmp_path / "out")
    proof = verify(str(tmp_path / "out"), smaller, loaded, plan, token_batch())
    assert (proof.max_diff_memory, proof.max_diff_bypass) == (0, pytest.approx(0, abs=1e-5))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_narrowing_on_request_is_what_gets_saved(tmp_path):
    folder = saved(ARCHITECTURES["llama"](), tmp_path / "wide")
    loaded = load_model(folder, dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == loaded.stored_dtype == torch.bfloat16
    widened = load_model(saved(ARCHITECTURES["llama"]().half(), tmp_path / "half"), dtype="float32", device="cpu")
    assert (widened.model.dtype, widened.stored_dtype) == (torch.float32, torch.float16)


def test_saving_leaves_the_model_in_memory_as_it_was(tmp_path):
    loaded = load_model(saved(ARCHITECTURES["llama"]().bfloat16(), tmp_path / "half"), device="cpu")
    smaller, _ = without(loaded, 1)
    config, weights = smaller.model.config.to_dict(), smaller.model.state_dict()
    changes = config_changes(loaded.model.config, smaller.model.config)
    save_model(smaller, tmp_path / "out")
    assert smaller.model.config.to_dict() == config
    assert config_changes(loaded.model.config, smaller.model.config) == changes
    assert all(torch.equal(weights[key], tensor) for key, tensor in smaller.model.state_dict().items())


# --- what goes along ---


def test_the_tokenizer_goes_along(llama, tmp_path):
    loaded = load_model(llama, device="cpu")
    save_model(without(loaded, 0)[0], tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the cat sees .")["input_ids"] == loaded.tokenizer("the cat sees .")["input_ids"]
    assert (again.pad_token, again.mask_token) == ("[PAD]", "[MASK]")


def test_sentence_transformers_files_go_along(tmp_path):
    folder = saved(ARCHITECTURES["bert"](), tmp_path / "encoder", tokenizer=True)
    modules = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    save_model(without(load_model(folder, device="cpu"), 1)[0], tmp_path / "out")
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_listed_module_cannot_reach_outside_the_folder(tmp_path):
    folder = saved(ARCHITECTURES["bert"](), tmp_path / "encoder")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("private")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": "../private", "type": "Pooling"}]))
    loaded = load_model(folder, device="cpu")
    with contextlib.suppress(AvssError):  # refusing is as good as leaving the file out
        save_model(without(loaded, 1)[0], tmp_path / "below" / "out")
    assert not (tmp_path / "below" / "private").exists()


# --- real models, where they are installed ---


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> Loaded:
    return load_model(smollm2_file, device="cpu")


@pytest.mark.real
def test_real_decoder_in_a_gguf_file_has_thirty_blocks(smollm2):
    facts = smollm2.facts()
    assert (facts.num_blocks, facts.stack, facts.head) == (30, "model.layers", "causal")
    assert (facts.architecture, facts.num_parameters) == ("LlamaForCausalLM", 134_515_008)
    assert (facts.dtype, facts.compute_dtype) == ("bfloat16", "float32")
    assert getattr(smollm2.model.config, "quantization_config", None) is None
    text = smollm2.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert smollm2.tokenizer.decode(run_outputs(smollm2, text)[0, -1].argmax()).strip() == "Paris"


@pytest.mark.real
def test_real_decoder_cut_saves_and_verifies_with_no_difference(smollm2, tmp_path):
    smaller, plan = without(smollm2, 3, 12, 13)
    save_model(smaller, tmp_path / "out")
    token_ids = smollm2.tokenizer("A short text is enough to tell two models apart.", return_tensors="pt")["input_ids"]
    proof = verify(str(tmp_path / "out"), smaller, smollm2, plan, (token_ids, torch.ones_like(token_ids).bool()))
    assert (proof.max_diff_memory, proof.max_diff_bypass) == (0, 0)
    assert proof.cached_generation is True
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


@pytest.mark.parametrize("limited", [False, True])
def test_the_saved_tokenizer_cuts_texts_where_the_given_one_did(limited, tmp_path):
    tokenizer = word_tokenizer(adds="cls")
    if limited:
        tokenizer.backend_tokenizer.enable_truncation(max_length=9, stride=1)
        tokenizer.backend_tokenizer.enable_padding(length=9, pad_id=3)
    before = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    loaded = adopt(ARCHITECTURES["bert"](), tokenizer)
    tokenizer(["the cat", "a dog sees"], truncation=True, max_length=3, padding=True)
    save_model(dataclasses.replace(loaded), tmp_path / "out")
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (saved.truncation, saved.padding) == before
    assert (before[0] is not None) == limited


@pytest.mark.real
def test_real_encoder_cut_stays_a_sentence_transformers_folder(minilm_folder, tmp_path):
    loaded = load_model(minilm_folder, device="cpu")
    assert (loaded.facts().num_blocks, loaded.head, loaded.max_len) == (6, "encoder", 512)
    smaller, plan = without(loaded, 1, 4)
    save_model(smaller, tmp_path / "out")
    token_ids = loaded.tokenizer("A short text.", return_tensors="pt")["input_ids"]
    proof = verify(str(tmp_path / "out"), smaller, loaded, plan, (token_ids, torch.ones_like(token_ids).bool()))
    assert (proof.max_diff_memory, proof.max_diff_bypass) == (0, 0)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (minilm_folder / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "settings", "pad", "expected"),
    [
        ("llama", {}, "[EOS]", 0),  # the model's own, whatever the tokenizer says
        ("llama", {"pad_token_id": None}, "[PAD]", VOCABULARY["[PAD]"]),
        ("llama", {"pad_token_id": -1}, None, VOCABULARY["[EOS]"]),
        ("llama-classifier", {"pad_token_id": 5}, None, 5),
        ("llama-classifier", {"pad_token_id": None}, "[PAD]", None),  # its head would read the padding
        ("llama-classifier", {"pad_token_id": -1}, "[PAD]", None),
    ],
)
def test_what_fills_up_a_batch_is_the_models_own(name, settings, pad, expected):
    model, tokenizer = ARCHITECTURES[name](), word_tokenizer()
    tokenizer.pad_token = pad
    for field, value in settings.items():
        setattr(model.config, field, value)
    assert adopt(model, tokenizer).pad_id == expected
