"""`avss prune --on-disk`, `--format gguf`, `--scores`, and `avss verify`, as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import avss
from avss import output, scoring
from avss.composer.disk import EarlierScores, fits_memory, memory_needed, score_blind
from avss.composer.proof import prove_at_rest
from avss.composer.provenance import versions
from avss.config import PlanConfig, parse_bytes
from avss.criteria import find_criteria
from avss.errors import ConfigError, InvalidPlanError, VerificationError
from avss.models.load import adopt, save_model
from avss.models.shards import read_checkpoint
from avss.record import Compensation, RunRecord
from tests.commands.test_bad_input import refused
from tests.commands.test_hub import cached, offline
from tests.laws.test_every_architecture import NAMED
from tests.support.architectures import ARCHITECTURES, randomise
from tests.support.gguf_files import write_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantised Llama."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# --- on disk ---


def test_on_disk_writes_what_the_cut_in_memory_writes(avss_command, llama_folder, tmp_path):
    for name, flag in (("disk", "--on-disk"), ("memory", "--in-memory")):
        answer = avss_command("prune", llama_folder, "--blocks", "1,3", flag, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        assert "Verified" in answer.out
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "memory"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("disk", "memory")]
    assert names[0] == names[1]
    disk = RunRecord.read(tmp_path / "disk")
    proof = disk.cuts[0].verification
    assert proof is not None
    assert proof.bytes_equal
    assert proof.max_diff_memory == proof.max_diff_bypass == 0
    assert "--on-disk" in disk.command
    card = (tmp_path / "disk" / "README.md").read_text()
    assert "byte for byte" in card


def test_what_does_not_fit_is_cut_on_disk_and_says_so(avss_command, llama_folder, tmp_path):
    arguments = ("prune", llama_folder, "--blocks", "1", "--max-memory", "100MB")
    answer = avss_command(*arguments, "--out", tmp_path / "one")
    assert answer.code == 0, answer.err
    assert "it is cut on disk" in answer.err
    assert "It was neither loaded nor run" in answer.out.replace("\n", " ")
    assert "cut on disk" in RunRecord.read(tmp_path / "one").warnings[0]
    answer = avss_command(*arguments, "--in-memory", "--out", tmp_path / "two")
    assert answer.code == 0, answer.err
    assert "cut on disk" not in answer.err


@pytest.mark.parametrize(("criterion", "removed"), [("first", (0, 1)), ("last", (3, 4))])
def test_baselines_choose_on_disk(avss_command, llama_folder, tmp_path, criterion, removed):
    arguments = ("--count", 2, "--criterion", criterion, "--on-disk", "--max-memory", "1MB", "--quiet")
    assert avss_command("prune", llama_folder, *arguments, "--out", tmp_path / "out").code == 0
    assert RunRecord.read(tmp_path / "out").cuts[0].plan.removed == removed


def test_random_draws_the_same_on_disk_and_in_memory(avss_command, llama_folder, text_file, tmp_path):
    arguments = ("--count", 2, "--criterion", "random", "--seed", 7, "--quiet", "--data", text_file)
    small = ("--samples", 4, "--seq-len", 16)
    for name, flags in (("disk", ("--on-disk", "--max-memory", "1MB")), ("memory", ())):
        answer = avss_command("prune", llama_folder, *arguments, *small, *flags, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
    one, two = (RunRecord.read(tmp_path / name) for name in ("disk", "memory"))
    assert one.cuts[0].plan == two.cuts[0].plan


def test_scores_of_an_earlier_run_choose(avss_command, llama_folder, text_file, tmp_path):
    small = ("--data", text_file, "--samples", 4, "--seq-len", 16, "--quiet")
    answer = avss_command(
        "score", llama_folder, "--criteria", "block-influence,update-norm", "--out", tmp_path / "scores", *small
    )
    assert answer.code == 0, answer.err
    choice = ("--count", 2, "--criterion", "update-norm", "--quiet")
    assert avss_command("prune", llama_folder, *choice, *small, "--out", tmp_path / "direct").code == 0
    for name, flags in (("disk", ("--on-disk", "--max-memory", "1MB")), ("memory", ())):
        arguments = (*choice, "--scores", tmp_path / "scores", *flags)
        answer = avss_command("prune", llama_folder, *arguments, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
    plans = [RunRecord.read(tmp_path / name).cuts[0].plan for name in ("direct", "disk", "memory")]
    assert plans[0] == plans[1] == plans[2]
    refused(
        avss_command(
            *("prune", llama_folder, "--count", 1, "--criterion", "avss", "--scores", tmp_path / "scores"),
            *("--out", tmp_path / "x"),
        ),
        "no scores by `avss`",
        "block-influence, update-norm",
    )
    refused(
        avss_command("prune", llama_folder, "--count", 1, "--scores", tmp_path, "--out", tmp_path / "x"), "no record"
    )


JUST_TOO_LITTLE = ("--max-memory", "600250000")
"""For the tiny Llama: room for its embeddings and blocks one at a time, not for a cut in memory."""


@pytest.mark.parametrize("flags", [("--on-disk",), ("--on-disk", "--device", "disk"), JUST_TOO_LITTLE])
@pytest.mark.parametrize("criterion", ["block-influence", "magnitude"])
def test_blocks_are_chosen_a_block_at_a_time(avss_command, llama_folder, text_file, tmp_path, criterion, flags):
    """The same scores and the same cut as in memory, from the first to the last digit."""
    common = ("--count", 2, "--criterion", criterion, "--data", text_file, "--samples", 4, "--seq-len", 16, "--quiet")
    for name, place in (("disk", flags), ("memory", ())):
        answer = avss_command("prune", llama_folder, *common, *place, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
    one, two = (RunRecord.read(tmp_path / name) for name in ("disk", "memory"))
    assert (one.scores, one.data, one.stability, one.cuts[0].plan) == (
        two.scores,
        two.data,
        two.stability,
        two.cuts[0].plan,
    )
    assert (one.model.device, two.model.device) == ("disk", "cpu")
    assert "Scoring blocks" in one.seconds
    assert any("it is cut on disk" in said for said in one.warnings) == (flags == JUST_TOO_LITTLE)
    assert one.cuts[0].verification is not None
    assert one.cuts[0].verification.outputs_compared
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("disk", "memory")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier", "mixtral", "t5", "vit"])
def test_what_memory_does_not_hold_is_run_a_block_at_a_time(tmp_path, name):
    """Room for everything but the blocks, and for one of them."""
    folder, plan = tmp_path / "whole", {"blocks": "1", "on_disk": True}
    model = ARCHITECTURES[name]() if name in ARCHITECTURES else NAMED[name][0]()
    save_model(adopt(model), folder)
    allowed = memory_needed(read_checkpoint(folder).num_values) - 1
    proof = avss.prune(folder, **plan, max_memory=allowed, out=tmp_path / "rest").record.cuts[0].verification
    assert proof is not None
    assert (proof.passed, proof.outputs_compared, proof.bytes_equal) == (True, True, True)
    assert proof.max_diff_memory is None
    assert proof.max_diff_bypass <= proof.tolerance
    assert proof.num_generated == (2 if name in ("llama", "gpt2", "mixtral") else 0)
    assert "bypassed" in (tmp_path / "rest" / "README.md").read_text()
    for against in (None, folder) if name in ("llama", "mixtral") else ():  # seconds each
        small = memory_needed(read_checkpoint(tmp_path / "rest").num_values) - 600_000_000
        report = avss.verify(tmp_path / "rest", against=against, max_memory=600_000_000 + small // 2 - 1)
        assert report.passed
        asked = " ".join(check.what for check in report.checks)
        assert "never imports avss" in asked
        assert "byte for byte" in asked
        assert ("bypassed" in asked, report.notes) == (True, ())
    scratch = output.cache_folder()
    assert not scratch.exists() or not list(scratch.glob(".blocks*"))


def test_a_wrong_copy_is_withdrawn_a_block_at_a_time(llama_folder, tmp_path):
    avss.prune(llama_folder, blocks="1", on_disk=True, out=tmp_path / "one", max_memory=10**6)
    plan = avss.RunRecord.read(tmp_path / "one").cuts[0].plan
    assert prove_at_rest(llama_folder, tmp_path / "one", plan).passed
    avss.prune(llama_folder, blocks="2", on_disk=True, out=tmp_path / "two", max_memory=10**6)
    with pytest.raises(VerificationError, match="withdrawn"):
        prove_at_rest(llama_folder, tmp_path / "two", plan)


@pytest.mark.parametrize("verb", ["score", "damage", "compare", "stability", "evaluate"])
def test_a_model_that_does_not_fit_stays_on_disk(avss_command, llama_folder, text_file, tmp_path, monkeypatch, verb):
    small = ("--data", text_file, "--samples", 4, "--seq-len", 16)
    if verb == "evaluate":
        small = ("--task", f"perplexity={text_file}", "--seq-len", 16, "--limit", 4)
    answers = {}
    for name, flags in (("memory", ()), ("disk", ("--device", "disk"))):
        answers[name] = avss_command(verb, llama_folder, *small, *flags)
        assert answers[name].code == 0, answers[name].err

    def without_text(said: str) -> str:
        """Without the warnings: one speaks of gradients, which cannot be had on disk."""
        return "\n".join(line for line in said.splitlines() if "gradient" not in line and "taylor" not in line)

    assert without_text(answers["disk"].out) == without_text(answers["memory"].out)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    unfit = avss_command(verb, llama_folder, *small)
    assert unfit.code == 0, unfit.err
    assert ("its blocks stay on disk" in unfit.out + unfit.err) == (verb != "evaluate")


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("prune", ("--blocks", 1, "--out", "OUT")),
        ("run", ("--blocks", 1, "--out", "OUT")),
        ("heal", ("--out", "OUT", "--budget", "1k")),
        ("evaluate", ("--task", "speed")),
        ("score", ("--criteria", "taylor")),
        ("score", ("--reference", "--seq-len", 16)),
    ],
)
def test_what_needs_the_whole_model_is_refused_on_disk(
    avss_command, llama_folder, text_file, tmp_path, verb, arguments
):
    given = [tmp_path / "out" if one == "OUT" else one for one in arguments]
    data = () if verb == "evaluate" else ("--data", text_file)
    answer = avss_command(verb, llama_folder, *given, *data, "--device", "disk", "--quiet")
    refused(answer, "needs the whole model in memory", "--device cpu")
    assert not (tmp_path / "out").exists()


def test_a_proof_that_cannot_be_made_does_not_cost_the_copy(llama_folder, tmp_path, monkeypatch):
    """Not every architecture runs from disk, nor every machine has room for it: the bytes were compared."""

    def stop(*_: object, **__: object) -> None:
        raise OSError("Read-only file system: '/home'")

    monkeypatch.setattr("avss.composer.proof.load_model", stop)
    allowed = memory_needed(read_checkpoint(llama_folder).num_values) - 1
    record = avss.prune(llama_folder, blocks="1", on_disk=True, max_memory=allowed, out=tmp_path / "out").record
    proof = record.cuts[0].verification
    assert proof is not None
    assert (proof.passed, proof.outputs_compared, proof.bytes_equal) == (True, False, True)
    assert "Read-only" in proof.note


def test_what_the_original_does_too_is_not_the_fault_of_the_cut(llama_folder, tmp_path, monkeypatch):
    """Some models compute another text with a cache before any cut."""
    allowed = memory_needed(read_checkpoint(llama_folder).num_values) - 1

    def pruned(name: str, answers: list[bool]) -> object:
        monkeypatch.setattr("avss.composer.proof._cached_equals_uncached", lambda *_, **__: answers.pop(0))
        return avss.prune(llama_folder, blocks="1", on_disk=True, max_memory=allowed, out=tmp_path / name)

    proof = pruned("both", [False, False]).record.cuts[0].verification
    assert (proof.passed, proof.cached_generation, proof.num_generated) == (True, None, 0)
    with pytest.raises(VerificationError, match="withdrawn"):
        pruned("one", [False, True])
    assert not (tmp_path / "one").exists()


def test_a_cache_that_cannot_be_written_to_is_not_needed(llama_folder, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("AVSS_CACHE", str(blocked / "cache"))
    loaded = avss.load(llama_folder, device="disk")
    assert loaded.files is not None


def test_stability_leaves_gradients_out_on_disk(llama_folder, text_file, caplog):
    settings = {"criteria": "taylor,block-influence", "samples": 4, "seq_len": 16}
    study = avss.stability(avss.load(llama_folder, device="disk"), str(text_file), **settings)
    assert {trial.criterion for trial in study.trials} == {"block-influence"}
    assert "Left out: `taylor`" in caplog.text


def test_a_gguf_file_is_not_left_on_disk(avss_command, gguf_file):
    refused(avss_command("score", gguf_file, "--device", "disk"), "decoded in memory", "--device disk")


def test_scores_of_another_model_are_refused(avss_command, llama_folder, encoder_folder, text_file, tmp_path):
    small = ("--data", text_file, "--samples", 4, "--seq-len", 16, "--quiet")
    assert avss_command("score", encoder_folder, "--out", tmp_path / "scores", *small).code == 0
    for flags in (("--on-disk",), ()):
        arguments = ("--count", 1, "--scores", tmp_path / "scores", "--out", tmp_path / "x", "--quiet", *flags)
        refused(avss_command("prune", llama_folder, *arguments), "4 blocks", "this model has 5")


def test_scores_of_a_model_with_as_many_blocks_are_refused(avss_command, llama_folder, text_file, tmp_path):
    small = ("--data", text_file, "--samples", 4, "--seq-len", 16, "--quiet")
    wide = LlamaConfig(**{**json.loads((llama_folder / "config.json").read_text()), "intermediate_size": 40})
    for name, model in (
        ("trained", randomise(LlamaForCausalLM.from_pretrained(llama_folder), seed=1)),
        ("wide", LlamaForCausalLM(wide)),
        ("qwen", ARCHITECTURES["qwen2"]()),
    ):
        model.save_pretrained(copy_of(llama_folder, tmp_path / name))
        answer = avss_command("score", tmp_path / name, "--out", tmp_path / f"{name}-scores", *small)
        assert answer.code == 0, answer.err
        arguments = ("--count", 1, "--scores", tmp_path / f"{name}-scores", "--out", tmp_path / "x", "--quiet")
        refused(avss_command("prune", llama_folder, *arguments), f"The scores are of `{name}`")
    refused(avss_command("prune", llama_folder, *arguments, "--on-disk"), "`qwen`", "type is `qwen2`", "`llama`")
    # A copy elsewhere is the same model, and so are scores computed in another dtype.
    twin = copy_of(llama_folder, tmp_path / "twin")
    for place, name in enumerate(("float32", "bfloat16")):
        scores, out = tmp_path / f"{name}-scores", tmp_path / f"out{place}"
        assert avss_command("score", twin, "--dtype", name, "--out", scores, *small).code == 0
        arguments = ("--count", 1, "--scores", scores, "--out", out, "--quiet")
        answer = avss_command("prune", llama_folder, *arguments, *(("--on-disk",) if place else ()))
        assert answer.code == 0, answer.err
        assert avss_command("prune", llama_folder, *arguments, "--force").code == 0


def test_scores_are_compared_by_what_both_sides_know(llama_folder):
    facts = avss.load(str(llama_folder), device="cpu").facts()
    scores = score_blind(find_criteria(["last"])[0], facts.num_blocks, seed=0)
    ours = versions()

    def refusal(scored, made_with=ours, model=facts):
        try:
            EarlierScores(scores, scored, made_with).of(model)
        except InvalidPlanError as error:
            return str(error).partition("whose ")[2].partition(" is")[0]
        return ""

    def like(**changes):
        return facts.model_copy(update=changes)

    assert EarlierScores(scores).of(facts) == scores  # of a model that nobody named
    assert refusal(facts) == ""
    assert refusal(like(stack="encoder.block")) == "stack"
    assert refusal(like(architecture="LlamaModel")) == "class"
    assert refusal(like(hidden_size=7)) == "width"
    assert refusal(like(model_type="qwen2")) == "type"
    assert refusal(like(fingerprint="other")) == "fingerprint"
    assert refusal(like(fingerprint="other"), {**ours, "transformers": "4.0"}) == ""
    assert refusal(like(fingerprint="other", compute_dtype="bfloat16")) == ""
    assert refusal(like(fingerprint="other", head="classifier", architecture="X", stack="x.layers")) == ""
    assert refusal(like(fingerprint="file-1", device="disk")) == ""
    assert refusal(like(fingerprint="file-1", device="disk"), model=like(fingerprint="file-2", device="disk"))
    gguf = like(fingerprint="file-1", device="disk", stack="blk", model_type="gguf", architecture="gguf")
    assert refusal(facts, model=gguf) == ""
    assert refusal(like(hidden_size=7), model=gguf) == "width"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--count", 1, "--criterion", "taylor"), ("taylor", "needs gradients", "--blocks", "--scores")),
        (("--blocks", "99"), ("`99`", "0 to 4")),
        (("--blocks", "0-4"), ("removes all",)),
        (("--blocks", "1", "--max-memory", "much"), ("much", "300MB")),
        (("--blocks", "1", "--max-memory", "-3GB"), ("-3GB",)),
        (("--blocks", "1", "--format", "gguf"), ("--on-disk",)),
        (("--blocks", "1", "--dtype", "bfloat16"), ("keeps every weight", "--dtype")),
        (("--count", 9, "--criterion", "last"), ("cannot be removed",)),
        (("--count", 1, "--max-memory", "1MB"), ("a block at a time takes about", "--max-memory", "--blocks")),
    ],
)
def test_prune_on_disk_refuses(avss_command, llama_folder, tmp_path, arguments, parts):
    answer = avss_command("prune", llama_folder, "--on-disk", "--out", tmp_path / "x", "--quiet", *arguments)
    refused(answer, *parts)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_cannot_be_cut_on_disk(avss_command, llama_folder, gguf_file, tmp_path):
    def on_disk(source: object) -> object:
        return avss_command("prune", source, "--blocks", "1", "--on-disk", "--out", tmp_path / "x", "--quiet")

    refused(on_disk(tmp_path / "nowhere"), "There is no folder")
    refused(on_disk(gguf_file), "--format gguf")
    pickles = copy_of(llama_folder, tmp_path / "pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    refused(on_disk(pickles), "pytorch_model.bin", "safetensors")
    short = copy_of(llama_folder, tmp_path / "short")
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-100])
    refused(on_disk(short), "not whole")
    gap = copy_of(llama_folder, tmp_path / "gap")
    state = load_file(gap / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if "layers.2." not in name}, gap / "model.safetensors")
    refused(on_disk(gap), "0 lists of 5 blocks")
    bare = copy_of(llama_folder, tmp_path / "bare")
    (bare / "config.json").unlink()
    refused(on_disk(bare), "no `config.json`")
    assert not (tmp_path / "x").exists()


def test_the_model_itself_is_not_overwritten(avss_command, tmp_path, llama_folder):
    own = copy_of(llama_folder, tmp_path / "own")
    (own / "record.json").write_text("{}")
    arguments = ("prune", own, "--blocks", "1", "--on-disk", "--out", own, "--force", "--quiet")
    refused(avss_command(*arguments), "which is read here")
    assert (own / "model.safetensors").is_file()


def test_a_hub_model_is_cut_from_its_cache_without_torch_in_the_process_that_copies(llama_folder, tmp_path):
    """In processes of its own: the one that copies, and the one that it asks about the architecture."""
    cached(tmp_path, "models", "acme", "tiny", {path.name: path.read_bytes() for path in llama_folder.iterdir()})
    arguments = ["avss", "prune", "acme/tiny", "--blocks", "1", "--on-disk", "--max-memory", "1MB", "--quiet"]
    code = (
        f"import sys, contextlib\nsys.argv = {[*arguments, '--out', str(tmp_path / 'out')]!r}\n"
        "from avss.cli.main import main\nwith contextlib.suppress(SystemExit):\n    main()\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    record = RunRecord.read(tmp_path / "out")
    assert record.model.source == "acme/tiny"
    proof = record.cuts[0].verification
    assert proof is not None
    assert (proof.passed, proof.outputs_compared) == (True, False)


def test_a_hub_model_that_does_not_fit_is_cut_on_disk_by_itself(llama_folder, tmp_path):
    cached(tmp_path, "models", "acme", "tiny", {path.name: path.read_bytes() for path in llama_folder.iterdir()})
    for memory, told in (("100MB", ["disk"]), ("64GB", ["cpu"])):
        out = str(tmp_path / memory)
        done = offline(tmp_path, "prune", "acme/tiny", "--blocks", "1", "--max-memory", memory, "--out", out)
        assert done.returncode == 0, done.stderr
        assert ("it is cut on disk" in done.stderr) == (told == ["disk"])
        record = RunRecord.read(tmp_path / memory)
        assert (record.model.source, [record.model.device]) == ("acme/tiny", told)


def test_a_hub_model_that_is_not_cached_is_one_sentence(avss_command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ("prune", "acme/absent", "--blocks", "1", "--on-disk", "--out", tmp_path / "x", "--quiet")
    refused(avss_command(*arguments), "The files of `acme/absent` cannot be had")


def test_amounts_of_memory():
    amounts = {"300MB": 3e8, "16 gb": 16e9, "1.5GiB": 1.5 * 2**30, "2000": 2000, "4k": 4000}
    assert all(parse_bytes(text) == value for text, value in amounts.items())
    for text in ("", "GB", "3XB", "nan", "-1", "0", "infGB", "9" * 400):
        with pytest.raises(ConfigError, match="amount of memory"):
            parse_bytes(text)
    for text in ("16G", "300MB", "1.5 GiB", "2000"):
        assert PlanConfig.model_validate({"max_bytes": text}).max_bytes == parse_bytes(text)


def test_the_proof_runs_where_the_user_says_and_else_on_the_cpu(avss_command, llama_folder, tmp_path, monkeypatch):
    from avss.composer import proof

    devices = []
    prove = proof.prove_saved
    monkeypatch.setattr(
        proof, "prove_saved", lambda *args, **rest: devices.append(rest["device"]) or prove(*args, **rest)
    )
    for place, arguments in enumerate([(), ("--device", "cpu")]):
        answer = avss_command(
            "prune", llama_folder, "--on-disk", "--blocks", 2, "--out", tmp_path / str(place), *arguments
        )
        assert answer.code == 0, answer.err
    prove_saved = avss_command(
        "prune", llama_folder, "--on-disk", "--blocks", 2, "--out", tmp_path / "x", "--device", "no"
    )
    assert prove_saved.code == 2
    assert devices == ["cpu", "cpu", "no"]


def test_what_fits_is_told_by_the_parameters(llama_folder, tmp_path):
    checkpoint = read_checkpoint(llama_folder)
    needed = memory_needed(checkpoint.num_values)
    assert needed - memory_needed(checkpoint.num_values, dtype="bfloat16") == 4 * checkpoint.num_values
    assert fits_memory(str(llama_folder), max_memory=needed) is None
    assert "cut on disk" in (fits_memory(str(llama_folder), max_memory=needed - 1) or "")
    assert fits_memory(str(tmp_path), max_memory=1) is None


def test_what_fits_is_told_of_a_hub_model_before_it_is_downloaded(llama_folder, monkeypatch):
    checkpoint, asked = read_checkpoint(llama_folder), []

    def on_the_hub(name, *, revision):
        asked.append((name, revision))
        shard = parse_safetensors_file(llama_folder / "model.safetensors")
        return SafetensorsRepoMetadata(metadata=None, sharded=False, weight_map={}, files_metadata={"one": shard})

    def not_cached(*_, **__):
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("avss.composer.disk.snapshot_download", not_cached)
    monkeypatch.setattr("avss.composer.disk.get_safetensors_metadata", on_the_hub)
    needed = memory_needed(checkpoint.num_values)
    assert fits_memory("owner/name", max_memory=needed, revision="old") is None
    assert "cut on disk" in (fits_memory("owner/name", max_memory=needed - 1) or "")
    assert asked == [("owner/name", "old"), ("owner/name", None)]

    class NoNetworkError(Exception):
        """Of whichever library asks: no kin of `OSError`."""

    def unreachable(*_, **__):
        raise NoNetworkError

    for error in (not_cached, unreachable):
        monkeypatch.setattr("avss.composer.disk.get_safetensors_metadata", error)
        assert fits_memory("owner/name", max_memory=1) is None


def parse_safetensors_file(path: Path) -> SafetensorsFileMetadata:
    """The header as `huggingface_hub` tells it."""
    tensors = {
        name: TensorInfo(dtype="F32", shape=list(tensor.shape), data_offsets=(0, 4 * tensor.numel()))
        for name, tensor in load_file(path).items()
    }
    return SafetensorsFileMetadata(metadata={}, tensors=tensors)


# --- GGUF ---


def test_a_gguf_file_is_cut_as_it_lies_and_run(avss_command, gguf_file, tmp_path):
    out = tmp_path / "smaller"
    answer = avss_command("prune", gguf_file, "--blocks", "1,3", "--format", "gguf", "--out", out)
    assert answer.code == 0, answer.err
    assert "Verified" in answer.out
    assert "llama-cli -m" in answer.out
    assert "ollama create smaller" in answer.out
    assert {path.name for path in out.iterdir()} == {"model.gguf", "Modelfile", "README.md", "record.json"}
    assert (out / "Modelfile").read_text() == "FROM ./model.gguf\n"
    cut = RunRecord.read(out).cuts[0]
    assert cut.file_format == "gguf"
    assert cut.model.num_blocks == 3
    assert cut.verification is not None
    assert cut.verification.bytes_equal
    assert cut.verification.outputs_compared
    assert cut.verification.max_diff_memory <= cut.verification.tolerance
    assert [change.field for change in cut.changes] == ["llama.block_count"]
    card = (out / "README.md").read_text()
    assert 'gguf_file="model.gguf"' in card
    assert "nothing was quantised again" in card


@pytest.mark.parametrize("way", [("--format", "gguf"), ()])
def test_warnings_speak_of_the_blocks_that_go(avss_command, gguf_file, text_file, tmp_path, monkeypatch, way):
    counts, real = [], scoring.score_warnings

    def spied(*arguments, count, **more):
        counts.append(count)
        return real(*arguments, count=count, **more)

    monkeypatch.setattr("avss.composer.scores.score_warnings", spied)
    small = ("--data", text_file, "--samples", 4, "--seq-len", 16, "--quiet")
    for number, size in enumerate((("--count", 3), ("--fraction", 0.5))):
        answer = avss_command(
            "prune", gguf_file, *size, *way, "--protect", "none", "--out", tmp_path / f"{number}", *small
        )
        assert answer.code == 0, answer.err
        assert counts[-1] == len(RunRecord.read(tmp_path / f"{number}").cuts[0].plan.removed)


def test_a_gguf_file_is_chosen_by_scores_of_its_own_weights(avss_command, gguf_file, text_file, tmp_path):
    small = ("--data", text_file, "--samples", 4, "--seq-len", 16, "--quiet")
    arguments = ("--count", 2, "--criterion", "block-influence", "--format", "gguf")
    answer = avss_command("prune", gguf_file, *arguments, "--out", tmp_path / "gguf", *small)
    assert answer.code == 0, answer.err
    answer = avss_command("prune", gguf_file, *arguments[:-2], "--out", tmp_path / "ordinary", *small)
    assert answer.code == 0, answer.err
    one, two = (RunRecord.read(tmp_path / name) for name in ("gguf", "ordinary"))
    assert one.cuts[0].plan == two.cuts[0].plan
    assert one.scores == two.scores
    assert (tmp_path / "ordinary" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--blocks", "99"), ("`99`",)),
        (("--count", 5, "--criterion", "last"), ("cannot be removed",)),
        (("--blocks", "1", "--format", "onnx"), ("onnx", "gguf")),
        ((), ("exactly one",)),
    ],
)
def test_prune_to_gguf_refuses(avss_command, gguf_file, tmp_path, arguments, parts):
    answer = avss_command("prune", gguf_file, "--format", "gguf", "--out", tmp_path / "x", "--quiet", *arguments)
    refused(answer, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_healed_gguf_cut_is_an_ordinary_checkpoint_and_says_so(avss_command, gguf_file, text_file, tmp_path):
    cut, healed = tmp_path / "cut", tmp_path / "healed"
    assert avss_command("prune", gguf_file, "--blocks", 1, "--format", "gguf", "--out", cut, "--quiet").code == 0
    arguments = ("--teacher", gguf_file, "--data", text_file, "--budget", "200 tokens", "--seq-len", 16)
    answer = avss_command("heal", cut, *arguments, "--out", healed, "--quiet")
    assert answer.code == 0, answer.err
    one = RunRecord.read(healed).cuts[0]
    assert one.file_format == "safetensors"
    assert [change.field for change in one.changes if "block_count" in change.field] == []
    card = (healed / "README.md").read_text()
    assert "from_pretrained" in card
    assert "llama-cli" not in card


def test_only_gguf_files_become_gguf_files(avss_command, llama_folder, tmp_path):
    arguments = ("--blocks", "1", "--format", "gguf", "--out", tmp_path / "x", "--quiet")
    refused(avss_command("prune", llama_folder, *arguments), "holds 0 GGUF files")
    refused(avss_command("prune", "owner/name", *arguments), "no GGUF file")
    baichuan = write_gguf(tmp_path / "b.gguf", architecture="baichuan")
    refused(avss_command("prune", baichuan, *arguments), "baichuan", "llama")
    assert not (tmp_path / "x").exists()


# --- verify ---


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """The tiny Llama without blocks 1 and 3. Do not change it."""
    out = tmp_path_factory.mktemp("verify") / "smaller"
    avss.prune(llama_folder, blocks=[1, 3], out=out, on_disk=True)
    return out


def test_verify_compares_with_the_original(avss_command, smaller, llama_folder):
    answer = avss_command("verify", smaller, "--against", llama_folder)
    assert answer.code == 0, answer.out + answer.err
    assert answer.out.count("held") == 6
    for part in ("never imports avss", "finite", "cache", "byte for byte", "bypassed", "blocks 1, 3"):
        assert part in answer.out


@pytest.mark.usefixtures("one_process")
def test_verify_finds_what_was_changed(avss_command, smaller, llama_folder, tmp_path):
    broken = copy_of(smaller, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0] *= 3
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    answer = avss_command("verify", broken, "--against", llama_folder, "--json")
    report = json.loads(answer.out)
    assert answer.code == 1
    assert not report["passed"]
    failed = [check["what"] for check in report["checks"] if not check["passed"]]
    assert len(failed) == 2
    assert "byte for byte" in failed[0]
    assert "bypassed" in failed[1]


@pytest.mark.usefixtures("one_process")
def test_verify_finds_keys_that_do_not_belong_and_nan(avss_command, smaller, tmp_path):
    broken = copy_of(smaller, tmp_path / "broken")
    (broken / "record.json").unlink()
    state = load_file(broken / "model.safetensors")
    state["stray"] = state.pop("model.layers.1.mlp.up_proj.weight")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    answer = avss_command("verify", broken)
    assert answer.code == 1
    assert "missing keys: model.layers.1.mlp.up_proj.weight" in answer.out
    assert "unexpected keys: stray" in answer.out
    assert answer.out.count("FAILED") == 2
    assert "compared with no original" in answer.out


def test_verify_of_a_truncated_file_fails_and_runs_nothing(avss_command, smaller, tmp_path):
    broken = copy_of(smaller, tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-8])
    answer = avss_command("verify", broken)
    assert answer.code == 1
    assert "FAILED" in answer.out
    assert "not whole" in answer.out
    assert "fresh" not in answer.out


@pytest.mark.usefixtures("one_process")
def test_weights_that_a_repair_or_healing_left_alone_are_compared(llama_folder, text_file, tmp_path, monkeypatch):
    thrown_away = Compensation(method="auto", note="The repair was thrown away.")
    monkeypatch.setattr("avss.composer.pruning.compensate_cut", lambda dense, raw, *_, **__: (raw, thrown_away))
    cut, healed, again = (tmp_path / name for name in ("cut", "healed", "again"))
    avss.prune(str(llama_folder), blocks=[2], compensate="auto", data=str(text_file), seq_len=16, out=cut)
    assert len(avss.verify(cut, against=llama_folder).checks) == 6

    small = {"teacher": str(llama_folder), "data": str(text_file), "budget": "300 tokens", "seq_len": 16}
    # At such a rate training only does harm.
    useless = avss.heal(cut, out=healed, learning_rate=1.0, validations=1, **small)
    assert useless.record.cuts[0].healing.best_step == 0
    report = avss.verify(healed, against=llama_folder)
    assert (len(report.checks), report.passed, report.notes) == (6, True, ())

    # What healed the weights before stays on record, where healing once more did not.
    once = avss.heal(cut, out=healed, force=True, validations=1, **small).record.cuts[0].healing
    assert once.best_step > 0
    twice = avss.heal(healed, out=again, learning_rate=1.0, validations=1, **small).record
    assert twice.cuts[0].healing == once
    assert any("no better" in warning for warning in twice.warnings)
    assert (
        avss.verify(again, against=llama_folder).notes[0].startswith("Its weights were changed after the cut (healing)")
    )


def test_a_model_whose_own_code_answers_with_a_plain_tuple_is_run(smaller, tmp_path):
    folder = copy_of(smaller, tmp_path / "tuple")
    (folder / "modeling_tuple.py").write_text(
        "from transformers import LlamaModel\n\n\n"
        "class TupleModel(LlamaModel):\n"
        "    def forward(self, input_ids=None, attention_mask=None, **more):\n"
        "        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **more).to_tuple()\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["TupleModel"], "auto_map": {"AutoModel": "modeling_tuple.TupleModel"}})
    )
    report = avss.verify(folder, head="encoder", trust_remote_code=True)
    checks = {check.what: check.passed for check in report.checks}
    assert checks["Its outputs are finite"]


@pytest.mark.usefixtures("one_process")
def test_without_a_record_equal_weights_tell_the_plan(smaller, llama_folder, tmp_path):
    nameless = copy_of(smaller, tmp_path / "nameless")
    (nameless / "record.json").unlink()
    report = avss.verify(nameless, against=llama_folder)
    assert report.passed
    assert report.plan is not None
    assert report.plan.removed == (1, 3)
    assert len(report.checks) == 6


@pytest.mark.usefixtures("one_process")
def test_the_original_is_found_beside_the_result(smaller, llama_folder, tmp_path):
    copy_of(llama_folder, tmp_path / llama_folder.name)
    report = avss.verify(copy_of(smaller, tmp_path / "result"))
    assert report.against == str(tmp_path / llama_folder.name)
    assert report.passed
    assert len(report.checks) == 6
    assert not report.notes


@pytest.mark.usefixtures("one_process")
def test_another_model_of_the_recorded_name_is_said_to_be_one_perhaps(smaller, llama_folder, tmp_path):
    other = copy_of(llama_folder, tmp_path / llama_folder.name)
    state = load_file(other / "model.safetensors")
    save_file(
        {key: tensor + 1 for key, tensor in state.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    result = copy_of(smaller, tmp_path / "result")
    report = avss.verify(result)
    assert not report.passed
    assert "found by its name in the record" in report.notes[-1]
    assert "--against" in report.notes[-1]
    named = avss.verify(result, against=other)
    assert not named.passed
    assert not named.notes


def test_a_model_that_does_not_fit_is_not_run(smaller, llama_folder):
    report = avss.verify(smaller, against=llama_folder, max_memory="1MB")
    assert [check.what for check in report.checks] == [
        "The files are whole",
        "The weights it kept are those of the original, byte for byte",
    ]
    assert len(report.notes) == 2


@pytest.mark.usefixtures("one_process")
def test_verify_reads_gguf_files(avss_command, gguf_file, tmp_path):
    out = tmp_path / "out"
    avss.prune(gguf_file, blocks="0,2", out=out, file_format="gguf", max_memory="1MB")
    answer = avss_command("verify", out, "--against", gguf_file)
    assert answer.code == 0, answer.out + answer.err
    assert answer.out.count("held") == 6
    other = write_gguf(tmp_path / "other.gguf", quantised="Q4_0")
    assert avss_command("verify", out, "--against", other, "--quiet").code == 1


@pytest.mark.usefixtures("one_process")
def test_verify_refuses_what_is_no_model(avss_command, smaller, encoder_folder, tmp_path):
    refused(avss_command("verify", tmp_path / "nowhere", "--quiet"), "is not there")
    refused(avss_command("verify", tmp_path, "--quiet"), "is not a model")
    refused(avss_command("verify", smaller, "--against", tmp_path / "nowhere", "--quiet"), "is not there")
    refused(avss_command("verify", smaller, "--max-memory", "lots", "--quiet"), "lots")
    refused(avss_command("verify", smaller, "--against", encoder_folder, "--quiet"), "`model.layers`", "cut from")
    deeper = tmp_path / "deeper"
    ARCHITECTURES["llama-tied"]().save_pretrained(deeper)
    refused(avss_command("verify", smaller, "--against", deeper, "--quiet"), "5 blocks", "6")


def test_verify_says_nothing_when_quiet(avss_command, smaller):
    answer = avss_command("verify", smaller, "--quiet", "--max-memory", "1MB")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_the_fresh_process_does_not_import_avss():
    from avss.models.fresh import _SCRIPT

    assert "import avss" not in _SCRIPT
    assert "from avss" not in _SCRIPT


@pytest.mark.real
def test_a_sentence_transformers_folder_is_cut_on_disk(minilm_folder, tmp_path):
    out = tmp_path / "out"
    record = avss.prune(minilm_folder, blocks="4", out=out, on_disk=True).record
    assert record.cuts[0].verification is not None
    assert record.cuts[0].verification.passed
    assert (out / "modules.json").is_file()
    assert (out / "1_Pooling" / "config.json").is_file()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, minilm_folder)]
    assert sizes[0] < sizes[1]


def test_settings_of_loading_in_python(llama_folder, gguf_file, tmp_path):
    """The same on disk as in memory, for a GGUF file too; what does not go there is refused in a sentence."""
    where = {"head": "causal", "device": "cpu", "trust_remote_code": False}
    for name, source, way in (("a", llama_folder, {"on_disk": True}), ("b", gguf_file, {"file_format": "gguf"})):
        cut = avss.prune(source, blocks=[1], out=tmp_path / name, loading={**where, "dtype": "auto"}, **way)
        assert cut.record.cuts[0].model.head == "causal"
        with pytest.raises(ConfigError, match="keeps every weight as it is stored"):
            avss.prune(source, blocks=[1], out=tmp_path / "none", loading={"dtype": "bfloat16"}, **way)
    assert avss.prune(llama_folder, blocks=[1], loading={"dtype": "bfloat16"}).record.model.compute_dtype == "bfloat16"
    with pytest.raises(ConfigError, match="Unknown setting of loading `dtyp`"):
        avss.prune(llama_folder, blocks=[1], loading={"dtyp": "bfloat16"})
