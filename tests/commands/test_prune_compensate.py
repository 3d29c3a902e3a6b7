"""`avss prune --compensate`: what is saved is repaired, proven in two halves, and told in record, card and page."""

import re

import numpy as np
import pytest
import torch
import transformers

import avss
from avss.compensation import split
from avss.config import DataConfig, RunConfig
from avss.errors import ConfigError
from avss.progress import Timed, silent
from avss.record import RunRecord
from avss.reporting.page import render_page

SMALL = ("--samples", 24, "--seq-len", 16)


@pytest.mark.parametrize("model", ["llama_folder", "encoder_folder", "classifier_folder"])
def test_repaired_checkpoint_is_verified_and_stock(avss_command, model, text_file, tmp_path, request):
    folder, out = request.getfixturevalue(model), tmp_path / "smaller"
    answer = avss_command(
        "prune", folder, "--blocks", 2, "--compensate", "auto", "--data", text_file, "--out", out, *SMALL
    )
    assert answer.code == 0, answer.err
    assert "Repair" in answer.out
    record = RunRecord.read(out)
    story, proof = record.cuts[0].compensation, record.cuts[0].verification
    assert story is not None
    assert proof is not None
    assert story.applied, story.note
    assert story.after < story.before
    assert proof.passed
    assert proof.of_raw_cut
    assert "raw cut" in answer.out
    assert record.data is not None
    card, page = (out / "README.md").read_text(), render_page(record)
    for text in (card, page):
        assert "Repaired without training" in text
        assert "before the weights were changed" in text
    _, info = getattr(transformers, record.cuts[0].model.architecture).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def test_a_repaired_model_is_measured_as_one(avss_command, llama_folder, text_file, tmp_path):
    out = tmp_path / "smaller"
    avss.prune(str(llama_folder), blocks=[2], compensate="refit", data=str(text_file), samples=24, seq_len=16, out=out)
    answer = avss_command("evaluate", out, "--baseline", llama_folder, "--task", f"perplexity={text_file}", "--json")
    cut = RunRecord.model_validate_json(answer.out).cuts[0]
    assert cut.compensation == RunRecord.read(out).cuts[0].compensation
    assert cut.name == "explicit, repaired"


def test_none_is_the_default_and_changes_no_weight(avss_command, llama_folder, text_file, tmp_path):
    for name, extra in (("plain", ()), ("none", ("--compensate", "none", "--data", text_file))):
        answer = avss_command("prune", llama_folder, "--blocks", 2, "--out", tmp_path / name, *extra)
        assert answer.code == 0, answer.err
        cut = RunRecord.read(tmp_path / name).cuts[0]
        assert cut.compensation is None
        assert not cut.verification.of_raw_cut
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "none"))
    assert one == two


def test_repair_in_memory_leaves_the_given_model_as_it_was(llama_folder, text_file):
    dense = avss.load(str(llama_folder), device="cpu")
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    small = avss.prune(dense, blocks=[2], compensate="refit", data=str(text_file), samples=24, seq_len=16)
    assert small.record.cuts[0].compensation.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.model.state_dict().items())
    assert small.record.settings["compensate"] == "refit"


@pytest.mark.parametrize(
    ("model", "given", "share"),
    [("llama_folder", None, 0.5), ("llama_folder", 0, 0.0), ("llama_folder", 1.0, 1.0), ("encoder_folder", None, 0.0)],
)
def test_a_repair_reads_the_share_asked_for_in_another_writing(avss_command, model, given, share, text_file, tmp_path,
                                                               request, monkeypatch):  # fmt: skip
    from avss.composer import pruning

    read, real = [], pruning.compensate_cut

    def spied(original, raw, plan, batches, **settings):
        read.append(batches)
        return real(original, raw, plan, batches, **settings)

    monkeypatch.setattr(pruning, "compensate_cut", spied)
    folder = request.getfixturevalue(model)
    words = () if given is None else ("--augment", given)
    answer = avss_command("prune", folder, "--blocks", 2, "--compensate", "refit", "--data", text_file, *words, *SMALL,
                          "--out", tmp_path / "out")  # fmt: skip
    assert answer.code == 0, answer.err
    record = RunRecord.read(tmp_path / "out")
    assert record.cuts[0].compensation.augment == share
    plain = avss.composer.calibration(avss.load(str(folder), device="cpu"), str(text_file), samples=24, seq_len=16)
    changed = [not torch.equal(one, two) for one, two in zip(read[0].sequences, plain.sequences, strict=True)]
    assert any(changed) == (share > 0)
    assert not all(changed)  # by chance one in seven stays as it is
    assert record.data.content_hash == plain.facts.content_hash  # scores read the text as it is


@pytest.mark.parametrize(
    ("given", "share", "sizes"),
    [
        (None, 0.0, {16: 18}),
        (0, 0.0, {16: 18}),
        (0.5, 0.5, {16: 9, 8: 18}),
        (0.25, 0.25, {16: 14, 8: 8}),
        (1, 1.0, {8: 36}),
    ],
)
def test_a_repair_reads_the_share_asked_for_in_short_windows(
    avss_command, llama_folder, given, share, sizes, text_file, tmp_path, monkeypatch
):
    from avss.composer import pruning

    monkeypatch.setattr("avss.data.short.SHORT", 8)
    read, real = [], pruning.compensate_cut
    monkeypatch.setattr(
        pruning, "compensate_cut", lambda *some, **how: read.append((some[3], how["fitted"])) or real(*some, **how)
    )
    words = () if given is None else ("--short", given)
    answer = avss_command("prune", llama_folder, "--blocks", 2, "--compensate", "auto", "--data", text_file, *words,
                          *SMALL, "--out", tmp_path / "out")  # fmt: skip
    assert answer.code == 0, answer.err
    record = RunRecord.read(tmp_path / "out")
    told = record.cuts[0].compensation
    assert told.short == share
    ((text, fitted),) = read
    # In another writing some have fewer tokens.
    assert {max(map(len, part.sequences)): len(part.sequences) for part in fitted} == sizes
    assert told.fit_tokens == sum(len(one) for part in fitted for one in part.sequences) <= 18 * 16
    assert min(map(len, text.sequences)) > 8  # scores and judges read whole windows
    said = f"fitted to {told.fit_tokens:,} tokens ({share:.0%} in short windows)"
    for shown in ((tmp_path / "out" / "README.md").read_text(), render_page(record), answer.out):
        assert (said in " ".join(shown.split())) == (share > 0)


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("prune", ("--blocks", 2, "--short", 0.5), "neither was asked for"),
        ("prune", ("--blocks", 2, "--short", 0.5, "--compensate", "refit"), "a repair by `auto`"),
        ("prune", ("--blocks", 2, "--short", 0.5, "--compensate", "auto"), "windows of 128 tokens or more"),
        ("prune", ("--blocks", 2, "--short", 7, "--compensate", "auto"), "between 0 and 1"),
        ("run", ("--count", 1, "--short", 0.5), "neither was asked for"),
        ("run", ("--count", 1, "--short", 0.5, "--compensate", "linear"), "a repair by `auto`"),
        ("run", ("--count", 1, "--short", 0.5, "--compensate", "auto"), "windows of 128 tokens or more"),
        ("prune", ("--blocks", 2, "--augment", 0.5), "neither was asked for"),
        ("prune", ("--blocks", 2, "--on-disk", "--augment", 0.5), "neither was asked for"),
        ("prune", ("--blocks", 2, "--augment", 7, "--compensate", "refit"), "between 0 and 1"),
        ("run", ("--count", 1, "--augment", 0.5), "neither was asked for"),
        ("run", ("--count", 1, "--augment", -1, "--heal", "2k"), "augment"),
    ],
)
def test_a_share_that_nothing_reads_is_refused(avss_command, llama_folder, verb, words, message, text_file, tmp_path):
    answer = avss_command(verb, llama_folder, *words, "--data", text_file, "--out", tmp_path / "out")
    assert answer.code == 2
    assert message in answer.err
    assert not (tmp_path / "out").exists()


def test_healing_in_a_whole_run_takes_over_the_share(avss_command, llama_folder, text_file, tmp_path):
    for name, words, share in (("default", (), 0.5), ("none", ("--augment", 0), 0.0)):
        answer = avss_command("run", llama_folder, "--heal", "2k", "--count", 1, "--compensate", "refit", "--data",
                              text_file, "--out", tmp_path / name, *words, *SMALL)  # fmt: skip
        assert answer.code == 0, answer.err
        cuts = RunRecord.read(tmp_path / name).cuts
        assert cuts[0].healing.settings["augment"] == share
        assert {one.compensation.augment for one in cuts if one.compensation is not None} <= {share}


FORM = "the cat {text} a dog {sees|runs}"


def test_a_whole_run_repairs_and_heals_in_the_prompts_of_its_tasks(avss_command, llama_folder, text_file, tmp_path):
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,label\n" + "the cat sees,good\na dog runs,bad\n" * 4, encoding="utf-8")
    asked = ("Review: {text}\nSentiment: {bad|good}",)
    for name, words, forms in (
        ("tasks", (), asked),
        ("none", ("--form", "none"), ()),
        ("own", ("--form", FORM), (FORM,)),
    ):
        answer = avss_command("run", llama_folder, "--heal", "2k", "--count", 1, "--compensate", "refit", "--data",
                              text_file, "--task", f"classification={reviews}", "--task", "speed", "--out",
                              tmp_path / name, *words, *SMALL)  # fmt: skip
        assert answer.code == 0, answer.err
        record = RunRecord.read(tmp_path / name)
        assert tuple(record.cuts[0].healing.settings["forms"]) == forms
        assert {one.compensation.forms for one in record.cuts if one.compensation is not None} <= {forms}
        assert any(one.compensation is not None for one in record.cuts)
        for page in ("report.html", "model/README.md"):
            text = (tmp_path / name / page).read_text(encoding="utf-8")
            assert ("drawn for the prompt" in text) == bool(forms), page
            same = "(read in the same ways" + (", 15% of the sequences as prompts)" if forms else ")")
            assert (same in text) == record.cuts[0].compensation.applied, page
        (line,) = re.findall(r"- \*\*Healing\*\*: .*", text)
        shown = [form.replace("\n", " / ") for form in forms]
        assert all(f"drawn for the prompt `{form}`" in line for form in shown)
        assert ("drawn for the prompt" in line) == bool(forms)


def test_texts_a_row_have_no_room_for_prompts_and_healing_has(llama_folder, text_file, tmp_path):
    settings = {
        "model": {"source": str(llama_folder)},
        "data": {"source": str(text_file), "samples": 24, "seq_len": 16, "layout": "padded"},
        "plan": {"count": 1},
        "compensate": "refit",
        "heal": {"budget": "500 tokens", "seq_len": 16},
        "tasks": [{"kind": "choice", "limit": 4}],
        "out": str(tmp_path / "out"),
    }
    record = avss.run(RunConfig.model_validate(settings))
    asked = ["Question: {text}\nAnswer: {text}"]
    assert record.cuts[0].healing.settings["forms"] == asked
    assert {one.compensation.forms for one in record.cuts if one.compensation is not None} == {()}


def test_forms_that_healing_cannot_read_are_refused_before_anything_is_measured(
    masked_folder, text_file, tmp_path, monkeypatch
):
    from avss.composer import whole

    def measured(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr(whole, "score_loaded", measured)
    settings = {
        "model": {"source": str(masked_folder)},
        "data": {"source": str(text_file), "samples": 4, "seq_len": 16},
        "plan": {"count": 1},
        "heal": {"budget": "500 tokens", "forms": [FORM]},
        "out": str(tmp_path / "out"),
    }
    with pytest.raises(ConfigError, match="`masked` head"):
        avss.run(RunConfig.model_validate(settings))


def test_a_prompt_that_is_left_out_is_told(llama_folder, text_file, tmp_path):
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,label\n" + "the cat sees,0\na dog runs,1\n" * 4, encoding="utf-8")
    settings = {
        "model": {"source": str(llama_folder)},
        "data": {"source": str(text_file), "samples": 24, "seq_len": 16},
        "plan": {"count": 1},
        "compensate": "refit",
        "tasks": [{"kind": "classification", "data": str(reviews), "labels": ["a|b", "c"]}],
        "out": str(tmp_path / "out"),
    }
    record = avss.run(RunConfig.model_validate(settings))
    assert any("not repaired or healed in the prompt" in text for text in record.warnings)


def test_a_repair_reads_windows_of_the_form_asked_for(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    from avss.composer import pruning

    read, real = [], pruning.compensate_cut

    def spied(original, raw, plan, batches, **settings):
        read.append(batches)
        return real(original, raw, plan, batches, **settings)

    monkeypatch.setattr(pruning, "compensate_cut", spied)
    answer = avss_command("prune", llama_folder, "--blocks", 2, "--compensate", "refit", "--data", text_file,
                          "--form", FORM, "--augment", 0, *SMALL, "--out", tmp_path / "out")  # fmt: skip
    assert answer.code == 0, answer.err
    assert RunRecord.read(tmp_path / "out").cuts[0].compensation.forms == (FORM,)
    loaded = avss.load(str(llama_folder), device="cpu")
    plain = avss.composer.calibration(loaded, str(text_file), samples=24, seq_len=16)
    start = loaded.tokenizer("the cat")["input_ids"]
    for one, two in zip(read[0].sequences, plain.sequences, strict=True):
        assert torch.equal(one, two) or one[: len(start)].tolist() == start
    assert not all(torch.equal(one, two) for one, two in zip(read[0].sequences, plain.sequences, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--form", FORM), "neither was asked for"),
        (("--form", FORM, "--on-disk"), "neither was asked for"),
        (("--form", "Review:", "--compensate", "refit"), "has no `{text}`"),
        (("--form", "{label} {text}", "--compensate", "refit"), "has `{label}`"),
    ],
)
def test_a_form_that_nothing_reads_or_that_is_none_is_refused(
    avss_command, llama_folder, words, message, text_file, tmp_path
):
    answer = avss_command("prune", llama_folder, "--blocks", 2, *words, "--data", text_file, "--out", tmp_path / "out")
    assert answer.code == 2
    assert message in answer.err
    assert not (tmp_path / "out").exists()


def _sentences(loaded, wanted, *, seed, may_go_on, on_step):
    """In place of a model's own writing, which on random weights is seldom fit."""
    words = loaded.tokenizer.get_vocab()
    draw = np.random.default_rng(seed)
    names = sorted(word for word in words if word.isalpha())
    return {
        form: tuple((" ".join(draw.choice(names, size=5)),) for _ in range(count)) for form, count in wanted.items()
    }


def test_the_answers_of_prompts_are_solved_for_and_told(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    from avss.composer import asking, pruning

    calls, read = [], []
    monkeypatch.setattr(asking, "write_rows", lambda *given, **how: calls.append(given[1]) or _sentences(*given, **how))
    real = pruning.compensate_cut
    monkeypatch.setattr(
        pruning,
        "compensate_cut",
        lambda *given, **how: read.append((how["fitted"], how["prompts"])) or real(*given, **how),
    )
    words = ("prune", llama_folder, "--blocks", 2, "--compensate", "auto", "--data", text_file, "--form", FORM,
             "--form", "a {text}", "--augment", 0, *SMALL)  # fmt: skip
    answer = avss_command(*words, "--written", 60, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert calls == [{FORM: 60, "a {text}": 60}]
    record = RunRecord.read(tmp_path / "out")
    found = record.cuts[0].compensation.answers
    assert found.num_prompts == 60 == len(read[0][1])
    said = "solved for" if found.kept else "thrown away"
    for text in ((tmp_path / "out" / "README.md").read_text(), render_page(record), answer.out):
        assert "answers of 60 prompts" in text.replace("\n", " ")
        assert said in text
    # The same sentences stand in the text that is fitted to.
    loaded = avss.load(str(llama_folder), device="cpu")
    read_text = " ".join(loaded.tokenizer.decode(one) for part in read[0][0] for one in part.sequences)
    rows = _sentences(loaded, {FORM: 60}, seed=0, may_go_on=None, on_step=None)[FORM]
    assert any(sentence in read_text for (sentence,) in rows)
    answer = avss_command(*words, "--written", 0, "--out", tmp_path / "none")
    assert answer.code == 0, answer.err
    assert len(calls) == 1
    assert RunRecord.read(tmp_path / "none").cuts[0].compensation.answers is None


def test_a_whole_run_writes_its_prompts_once(avss_command, llama_folder, text_file, tmp_path, monkeypatch):
    from avss import healing
    from avss.composer import asking, whole

    calls, given = [], []
    monkeypatch.setattr(asking, "write_rows", lambda *some, **how: calls.append(some[1]) or _sentences(*some, **how))
    real = whole.heal_cut
    monkeypatch.setattr(whole, "heal_cut", lambda *some, **how: given.append(how["rows"]) or real(*some, **how))
    words = ("run", llama_folder, "--heal", "2k", "--count", 1, "--data", text_file, "--task", "speed", "--form", FORM)
    answer = avss_command(*words, "--compensate", "auto", "--written", 50, *SMALL, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert calls == [{FORM: 50}]
    assert [len(rows[FORM]) for rows in given] == [50]
    cuts = RunRecord.read(tmp_path / "out").cuts
    assert cuts[0].compensation.answers.num_prompts == cuts[0].healing.answers.num_prompts
    assert not (tmp_path / ".out.healing").exists()  # what was kept for a killed run is gone
    # Without a repair that reads them, healing writes its own, and as many as were asked for.
    monkeypatch.setattr(healing, "write_rows", lambda *some, **how: calls.append(some[1]) or _sentences(*some, **how))
    answer = avss_command(*words, "--written", 40, *SMALL, "--out", tmp_path / "raw")
    assert answer.code == 0, answer.err
    assert given[1] is None
    assert calls == [{FORM: 50}, {FORM: 40}]
    assert RunRecord.read(tmp_path / "raw").cuts[0].healing.answers.num_prompts > 0


@pytest.mark.parametrize(
    ("wanted", "heals", "expected"),
    [
        (None, False, {FORM: 512, "a {text}": 2}),  # an eighth of 24 sequences of 16 tokens, of 40 each
        (None, True, {FORM: 512, "a {text}": 512}),
        (7, False, {FORM: 7, "a {text}": 7}),
        (0, True, None),
    ],
)
def test_as_many_prompts_are_written_as_are_read(llama_folder, text_file, monkeypatch, wanted, heals, expected):
    from avss.composer import asking

    calls = []
    monkeypatch.setattr(asking, "write_rows", lambda *some, **how: calls.append(some[1]) or _sentences(*some, **how))
    loaded = avss.load(str(llama_folder), device="cpu")
    batches = avss.composer.calibration(
        loaded, str(text_file), samples=24, seq_len=16, forms=[FORM, "a {text}"], augment=0
    )
    rows = asking.Asking(loaded, batches, wanted, Timed(silent), heals=heals).rows
    assert {form: len(some) for form, some in rows.items()} == (expected or {})
    assert calls == ([expected] if expected else [])


def test_what_was_written_is_read_again_by_a_run_that_goes_on(llama_folder, text_file, tmp_path, monkeypatch):
    from avss.composer import asking

    calls, kept = [], tmp_path / "kept.json"
    monkeypatch.setattr(asking, "write_rows", lambda *some, **how: calls.append(some[1]) or _sentences(*some, **how))
    loaded = avss.load(str(llama_folder), device="cpu")
    batches = avss.composer.calibration(loaded, str(text_file), samples=24, seq_len=16, forms=[FORM], augment=0)

    def again():
        return asking.Asking(loaded, batches, 40, Timed(silent), kept=kept)

    first = again()
    assert not calls  # not before they are needed
    rows = first.rows
    assert again().rows == rows
    assert len(calls) == 1
    kept.write_text("[broken")
    assert again().rows == rows
    assert len(calls) == 2
    # Sentences of the rows stand in what is fitted, but for those that judge.
    read = [loaded.tokenizer.decode(one) for part in first.fitted() for one in part.sequences]
    judging = {sentence for place, (sentence,) in enumerate(rows[FORM]) if place % 4 == 0}
    others = {sentence for (sentence,) in rows[FORM]} - judging
    assert len(read) == len(split(batches)[0].sequences)
    assert any(sentence in one for sentence in others for one in read)
    assert not any(sentence in one for sentence in judging for one in read)
    assert {one.row for one in first.prompts()} == set(range(40))


@pytest.mark.parametrize(
    "words",
    [
        ("--written", 5, "--quality", "best", "--task", "speed"),
        ("--written", 0, "--compensate", "auto", "--task", "speed"),
        ("--written", 5, "--compensate", "refit", "--form", FORM, "--task", "speed"),
        ("--written", 5, "--compensate", "auto", "--form", "none"),
    ],
)
def test_a_run_refuses_prompts_that_nothing_would_read_before_it_measures(
    avss_command, llama_folder, words, text_file, tmp_path, monkeypatch
):
    from avss.composer import whole

    monkeypatch.setattr(whole, "score_loaded", None)
    answer = avss_command("run", llama_folder, *words, "--count", 1, "--data", text_file, "--out", tmp_path / "out")
    assert answer.code == 2
    assert "the forms of prompts" in answer.err
    assert not (tmp_path / "out").exists()


def test_prompts_to_write_count_in_a_whole_dataconfig_too(llama_folder, text_file):
    data = DataConfig(source=str(text_file), samples=24, seq_len=16, written=5)
    for more, said in (({}, "none were named"), ({"forms": (FORM,)}, "a repair by `auto`")):
        with pytest.raises(ConfigError, match=said):
            avss.prune(str(llama_folder), blocks=[2], compensate="refit", data=data.model_copy(update=more))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--written", 5), "neither was asked for"),
        (("--written", 5, "--compensate", "auto"), "none were named"),
        (("--written", 5, "--compensate", "auto", "--form", "none"), "none were named"),
        (("--written", 5, "--form", FORM, "--compensate", "refit"), "a repair by `auto`"),
        (("--written", -1, "--form", FORM, "--compensate", "auto"), "greater than or equal to 0"),
    ],
)
def test_prompts_that_nothing_would_read_are_refused(avss_command, llama_folder, words, message, text_file, tmp_path):
    answer = avss_command("prune", llama_folder, "--blocks", 2, *words, "--data", text_file, "--out", tmp_path / "out")
    assert answer.code == 2
    assert message in answer.err
    assert not (tmp_path / "out").exists()


def test_forms_are_refused_for_a_model_that_continues_no_text(avss_command, masked_folder, text_file, tmp_path):
    answer = avss_command("prune", masked_folder, "--blocks", 2, "--compensate", "refit", "--form", FORM, "--data",
                          text_file, "--out", tmp_path / "out")  # fmt: skip
    assert answer.code == 2
    assert "continue running text" in answer.err


def test_a_changed_weight_after_the_repair_fails_the_proof(llama_folder, text_file, tmp_path, monkeypatch):
    """The repaired model is compared with memory: a save that lost the repair would be noticed."""
    from avss.composer import pruning

    real = pruning.save_model
    dense = avss.load(str(llama_folder), device="cpu")
    raw = pruning.cut(dense, avss.Plan(num_blocks=len(dense.stack), removed=(2,), method="explicit", rule="by hand"))
    monkeypatch.setattr(pruning, "save_model", lambda smaller, folder: real(raw, folder))
    with pytest.raises(avss.AvssError, match="differ from the model in memory"):
        avss.prune(
            dense, blocks=[2], compensate="refit", data=str(text_file), samples=24, seq_len=16, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
