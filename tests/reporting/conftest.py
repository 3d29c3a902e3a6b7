"""Records to report on: a realistic one, and the corners of what a record may hold."""

import functools
import math
import random

import pytest

from avss.record import (
    BlockScores,
    CurvePoint,
    Cut,
    DataFacts,
    FieldChange,
    Measurement,
    ModelFacts,
    Plan,
    Retention,
    RunRecord,
    ScoreTable,
    SearchResult,
    Verification,
)
from avss.reporting import charts, page

HOSTILE = '</script><script>alert("x")</script> {{ 7*7 }} | `ü` 模型 & <img src=x onerror=y>'

LEAVE_ONE_OUT = (
    *(46783, 464, 41.7, 28.2, 28.1, 27.9, 32.1, 27.4, 44.1, 29.4),
    *(29.6, 88.3, 27.9, 27.7, 27.1, 30.1, 31.1, 28.1, 31.4, 31.3),
    *(37.3, 31.2, 29.6, 36.1, 45.7, 28.2, 28.7, 32.1, 82.6, 186.9),
)


def model_facts(num_blocks=30, total=30, **changes):
    per_block, rest = 3_540_096, 28_312_128
    facts = {
        "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "head": "causal",
        "stack": "model.layers",
        "num_blocks": num_blocks,
        "hidden_size": 576,
        "num_parameters": rest + per_block * num_blocks,
        "num_block_parameters": per_block * num_blocks,
        "checkpoint_bytes": 2 * (rest + per_block * num_blocks),
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "device": "cpu",
        "fingerprint": f"{total:08x}{num_blocks:08x}",
    }
    return ModelFacts(**facts | changes)


def data_facts(**changes):
    facts = {
        "source": "builtin:calibration",
        "layout": "packed",
        "num_sequences": 64,
        "seq_len": 512,
        "num_tokens": 32768,
        "batch_size": 8,
        "seed": 0,
        "content_hash": "91c0de44aa17be02",
    }
    return DataFacts(**facts | changes)


def block_scores(criterion, title, values, **changes):
    noise = random.Random(criterion)
    bare = tuple(value * noise.uniform(0.9, 1.1) for value in values)
    facts = {"criterion": criterion, "title": title, "values": tuple(values), "without_first_token": bare}
    return BlockScores(**facts | changes)


def criteria(num_blocks=30):
    noise = random.Random(7)
    depth = [0.8 * 1.35**block * noise.uniform(0.9, 1.1) for block in range(num_blocks)]
    bowl = [0.03 + 0.4 * abs(2 * block / num_blocks - 1) ** 3 + 0.03 * noise.random() for block in range(num_blocks)]
    return (
        block_scores(
            "block-influence",
            "Block Influence",
            bowl,
            paper="Men et al. 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
            reference_url="https://arxiv.org/abs/2403.03853",
        ),
        block_scores(
            "avss",
            "AVSS",
            depth,
            factors={"variance": tuple(depth), "near_zero_share": tuple(1.0 for _ in depth)},
            paper="Song et al. 2024, AVSS: Layer Importance Evaluation in Large Language Models via Activation "
            "Variance-Sparsity Analysis",
            reference_url="https://arxiv.org/abs/2411.02117",
            note="On pre-norm decoders this ratio grows with depth and ranks blocks by position.",
        ),
        block_scores("avss-other", "Another AVSS", [value**0.5 + 0.05 for value in bowl]),
        block_scores(
            "leave-one-out",
            "Measured damage, one block at a time",
            [math.log(LEAVE_ONE_OUT[block % 30] / 23.5) for block in range(num_blocks)],
            without_first_token=None,
            note="Natural logarithm of the perplexity ratio.",
        ),
    )


def measurements(ppl, ppl_se, piqa, sst2, speed):
    language = {"num_samples": 16, "higher_is_better": False, "source": "builtin:evaluation"}
    choice = {"metric": "accuracy", "higher_is_better": True, "chance": 0.5}
    found = [
        Measurement(task="perplexity", metric="perplexity", value=ppl, stderr=ppl_se, **language),
        Measurement(
            task="perplexity", metric="loss", value=math.log(ppl), stderr=ppl_se / ppl, unit="nats", **language
        ),
        Measurement(
            task="choice:piqa", value=piqa, stderr=math.sqrt(piqa * (1 - piqa) / 400), num_samples=400, **choice
        ),
        Measurement(
            task="sentiment:sst2", value=sst2, stderr=math.sqrt(sst2 * (1 - sst2) / 300), num_samples=300, **choice
        ),
        Measurement(
            task="speed",
            metric="prefill",
            value=speed,
            stderr=speed / 60,
            num_samples=20,
            higher_is_better=True,
            unit="tokens/s",
        ),
    ]
    return tuple(found)


def retention(dense, after, flips):
    entries = []
    for before, now in zip(dense, after, strict=False):
        ratio = now.value / before.value
        same = {"task": now.task, "metric": now.metric, "dense": before.value, "value": now.value, "ratio": ratio}
        if now.metric == "perplexity":
            kept = math.log(before.value) / math.log(now.value)
            entries.append(Retention(**same, ratio_stderr=0.02 * ratio, kept=kept))
        elif now.metric == "loss":
            entries.append(Retention(**same, ratio_stderr=0.006 * ratio, kept=1 / ratio))
        elif now.metric == "accuracy":
            corrected = (now.value - now.chance) / (before.value - now.chance)
            entries.append(
                Retention(
                    **same,
                    ratio_stderr=0.021,
                    kept=ratio,
                    chance_corrected=corrected,
                    chance_corrected_stderr=0.07,
                    flips=flips,
                )
            )
    return tuple(entries)


def make_cut(dense, method, removed, results, flips=0.1, num_blocks=30, **changes):
    plan = Plan(
        num_blocks=num_blocks, removed=removed, method=method, rule=f"{len(removed)} of {num_blocks} (23 %) lowest"
    )
    after = measurements(*results)
    facts = {
        "plan": plan,
        "model": model_facts(num_blocks - len(removed)),
        "changes": (
            FieldChange(field="num_hidden_layers", before=num_blocks, after=num_blocks - len(removed)),
            FieldChange(field="layer_types", before=["full_attention"] * 30, after=["full_attention"] * 23),
        ),
        "measurements": after,
        "retention": retention(dense, after, flips),
        "samples": ("the sea, and the the the sea was quiet.", "print('hello, hello')"),
    }
    return Cut(**facts | changes)


def make_record(**changes):
    dense = measurements(36.0712, 0.8134, 0.6825, 0.82, 5120.0)
    divergence = Measurement(
        task="divergence", metric="kl_nats", value=1.0311, stderr=0.0204, num_samples=16, higher_is_better=False,
        unit="nats",
    )  # fmt: skip
    proof = Verification(
        reload_strict=True, max_diff_memory=0.0, max_diff_bypass=1.9e-6, tolerance=1e-4, cached_generation=True,
        num_generated=16,
    )  # fmt: skip
    asked = make_cut(
        dense, "block-influence", (12, 13, 14, 15, 17, 25, 26), (121.7, 3.9, 0.6275, 0.7733, 6540.0), 0.14,
        path="model", verification=proof,
    )  # fmt: skip
    asked = asked.model_copy(update={"measurements": (*asked.measurements, divergence)})
    published = make_cut(dense, "avss", tuple(range(7)), (71418.3, 1204.0, 0.5125, 0.4967, 6533.0), 0.51)
    facts = {
        "created": "2025-11-20T14:03:11Z",
        "command": "avss run HuggingFaceTB/SmolLM2-135M-Instruct --criterion block-influence --fraction 0.25",
        "versions": {"python": "3.11.9", "avss": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "model": model_facts(),
        "data": data_facts(),
        "scores": criteria(),
        "warnings": (
            "`avss` ranks the blocks of this model almost by depth (Spearman 0.99). Its cut raised perplexity 1,980 "
            "times.",
        ),
        "dense": dense,
        "cuts": (asked, published),
        "prompts": ("The old man looked at", "def greet():"),
        "samples": ("the sea for a long time before he spoke.", "    print('hello')"),
        "seconds": {"load": 1.9, "collect": 41.2, "cut": 3.3, "evaluate": 212.0},
        "settings": {"criteria": ["block-influence", "avss"], "fraction": 0.25, "seed": 0},
    }
    return RunRecord(**facts | changes)


def search_result(**changes):
    """A search that ended early: eight sizes, the last of them never measured."""
    order = (17, 16, 18, 14, 15, 13, 12, 5)
    sizes = range(1, len(order) + 1)
    points = [
        CurvePoint(
            removed=tuple(sorted(order[:size])),
            how="greedy" if size < 7 else "window",
            cost=0.11 * size,
            cost_stderr=0.01 * size,
            distance=0.11 * size,
            stderr=0.01 * size,
            loss_change=0.12 * size,
            loss_change_stderr=0.02 * size,
            perplexity=36.1 * 1.15**size,
            num_sequences=24,
        )
        for size in sizes
    ]
    points[-1] = CurvePoint(removed=tuple(sorted(order)), how="prior", cost=math.nan, distance=math.nan)
    facts = {
        "created": "2026-11-24T06:00:00+00:00",
        "method": "greedy",
        "objective": "kl",
        "measure": "kl",
        "num_blocks": 30,
        "protected": (0, 29),
        "points": tuple(points),
        "dense_loss": math.log(36.1),
        "num_blocks_run": 6000,
        "passes": 33.3,
        "passes_of_all": 168.0,
        "num_sets": 120,
        "seconds": 321.0,
        "is_complete": False,
        "model": model_facts(),
        "data": data_facts(),
    }
    return SearchResult(**facts | changes)


def without_cuts():
    return make_record(cuts=(), prompts=(), samples=(), dense=())


def smallest():
    scores = (block_scores("angular", "Angular distance", (0.2, 0.1)),)
    return RunRecord(created="2025-11-20", command="avss score m", model=model_facts(2), scores=scores)


def with_nan():
    values = [math.nan, math.inf, *(0.1 * block for block in range(28))]
    blind = Measurement(task="perplexity", metric="perplexity", value=math.nan, num_samples=0, higher_is_better=False)
    cut = make_cut((), "toy", (3,), (40.0, 1.0, 0.5, 0.5, 1.0), retention=(), measurements=(blind,))
    return make_record(scores=(block_scores("toy", "Toy", values),), dense=(blind,), cuts=(cut,))


def hostile():
    record = make_record()
    plan = record.cuts[0].plan.model_copy(update={"method": HOSTILE, "rule": HOSTILE})
    changes = (FieldChange(field=HOSTILE, before=HOSTILE, after=[HOSTILE]),)
    cut = record.cuts[0].model_copy(update={"plan": plan, "changes": changes, "samples": (HOSTILE, HOSTILE)})
    return make_record(
        command=HOSTILE,
        warnings=(HOSTILE,),
        model=model_facts(source=HOSTILE, revision=HOSTILE),
        data=data_facts(source=HOSTILE, column=HOSTILE),
        scores=(block_scores(HOSTILE, HOSTILE, [0.1 * b for b in range(30)], note=HOSTILE, paper=HOSTILE,
                             reference_url="javascript:alert(1)"),),
        cuts=(cut,),
        prompts=(HOSTILE, HOSTILE),
        samples=(HOSTILE, HOSTILE),
        versions={HOSTILE: HOSTILE},
        settings={HOSTILE: HOSTILE},
    )  # fmt: skip


def largest():
    noise = random.Random(3)
    scores = tuple(
        block_scores(f"criterion-{index}", f"Criterion {index}", [noise.random() for _ in range(126)])
        for index in range(20)
    )
    dense = measurements(6.1, 0.1, 0.8, 0.9, 100.0)
    cuts = tuple(
        make_cut(
            dense,
            f"criterion-{index}",
            tuple(sorted(noise.sample(range(126), 32))),
            (9 + index, 0.2, 0.75, 0.85, 130.0),
            num_blocks=126,
        )
        for index in range(12)
    )
    return make_record(model=model_facts(126), scores=scores, dense=dense, cuts=cuts)


EDGES = {
    "realistic": make_record,
    "without_cuts": without_cuts,
    "smallest": smallest,
    "with_nan": with_nan,
    "hostile": hostile,
}


@pytest.fixture(scope="session")
def record():
    return make_record()


@pytest.fixture(scope="session")
def table(record):
    return ScoreTable(scores=record.scores, model=record.model, data=record.data)


@pytest.fixture(scope="session", params=EDGES)
def any_edge(request):
    """The name of a record, for tests that must hold for all of them."""
    return request.param


@pytest.fixture(scope="session")
def any_record(any_edge):
    return EDGES[any_edge]()


@pytest.fixture(scope="session")
def specs_of():
    """The figures of a record by its name, as Vega-Lite, built once in a test run."""
    return functools.cache(lambda name: {k: chart.to_dict() for k, chart in charts.figures(EDGES[name]()).items()})


@pytest.fixture(scope="session")
def page_of():
    """The page of a record by its name, drawn once in a test run."""
    return functools.cache(lambda name: page.render_page(EDGES[name]()))


@pytest.fixture(scope="session")
def hostile_record():
    return hostile()


@pytest.fixture(scope="session")
def hostile_text():
    return HOSTILE


@pytest.fixture(scope="session")
def nan_record():
    return with_nan()


@pytest.fixture(scope="session")
def bare_record():
    return without_cuts()


@pytest.fixture(scope="session")
def largest_record():
    return largest()
