"""The laws that a cut obeys, for any architecture, in an order in which the first broken one tells most."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from tests.support.oracles import hook_count, without_blocks
from torch import Tensor, nn
from transformers import PreTrainedModel

from avss.collect import collect
from avss.cut import cut
from avss.errors import ModelLoadError, UnsupportedArchitectureError
from avss.models.forward import run_body, run_outputs
from avss.models.load import Loaded, adopt, load_model, save_model
from avss.models.probe import probe_inputs
from avss.models.stack import bypassed, find_stacks
from avss.record import Plan
from avss.statistics import Moments

TOLERANCE = 2e-5
NUM_GENERATED = 6
PLACES = ("first", "middle", "last", "scattered")


class BrokenLawError(Exception):
    """A cut was made and is wrong. This must never happen."""


class VacuousProbeError(Exception):
    """The tiny model does not use some of its blocks, so nothing can be proven on it."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one stack.

    Attributes:
        stack: Its name.
        path: Its path.
        chosen: Whether avss takes it by itself.
        cuts: Place -> `passed`, or the reason for refusal.
    """

    stack: str
    path: str
    chosen: bool
    cuts: dict[str, str]


def places(count: int) -> dict[str, tuple[int, ...]]:
    """The cuts that are tried."""
    return {
        "first": (0,),
        "middle": (count // 2,),
        "last": (count - 1,),
        "scattered": (1, count - 2) if count > 3 else (count - 1,),
    }


def judge(model: PreTrainedModel, head: str = "auto", *, tried: Container[str] = PLACES) -> list[Verdict]:
    """Tries every place of every stack of a model, and holds the laws against each cut.

    Args:
        model: Tiny, random.
        head: What it is used as.
        tried: Which of `PLACES` are tried.

    Raises:
        BrokenLawError: A law does not hold.
        UnsupportedArchitectureError: There is no stack.
    """
    chosen = adopt(model, head=head).stack
    verdicts = []
    for stack in find_stacks(model)[0]:
        loaded = dataclasses.replace(adopt(model, head=head), stack_name=stack.path)
        outcome: dict[str, str] = {}
        for place, removed in places(len(stack)).items():
            # Stacks that must be named are tried once: they take the same way through the code.
            if place not in tried or (stack.path != chosen.path and place != "scattered"):
                continue
            plan = Plan(num_blocks=len(stack), removed=removed, method="explicit", rule="by hand")
            try:
                smaller = cut(loaded, plan)
            except UnsupportedArchitectureError as error:
                outcome[place] = str(error)
                continue
            for law in LAWS:
                law(loaded, smaller, plan)
            outcome[place] = "passed"
        verdicts.append(Verdict(stack=stack.name, path=stack.path, chosen=stack.path == chosen.path, cuts=outcome))
        if any(result == "passed" for result in outcome.values()):
            empty_plan_gives_the_same_bits(loaded)
        if stack.path == chosen.path and any(result == "passed" for result in outcome.values()):
            a_block_at_a_time_gives_the_same_bits(loaded)
    return verdicts


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max() / max(1.0, float(other.abs().max())))


def _expect(holds: bool, law: str) -> None:
    if not holds:
        raise BrokenLawError(law)


def empty_plan_gives_the_same_bits(loaded: Loaded) -> None:
    """Cutting nothing changes nothing."""
    plan = Plan(num_blocks=len(loaded.stack), removed=(), method="explicit", rule="nothing")
    inputs = probe_inputs(loaded.tower())
    _expect(
        torch.equal(run_outputs(cut(loaded, plan).tower(), inputs), run_outputs(loaded.tower(), inputs)),
        "an empty plan gives other outputs",
    )


def a_block_at_a_time_gives_the_same_bits(loaded: Loaded) -> None:
    """A model whose blocks stay on disk computes what it computes in memory, and holds none of them afterwards."""
    inputs = probe_inputs(loaded.tower(), seed=3)
    with tempfile.TemporaryDirectory() as folder:
        save_model(dataclasses.replace(loaded, model=copy.deepcopy(loaded.model)), Path(folder))
        try:
            whole = load_model(folder, device="cpu", stack=loaded.stack.path)
        except ModelLoadError:
            return  # transformers does not give the tiny model back
        resting = load_model(folder, device="disk", stack=loaded.stack.path)
        one, other = (run_outputs(each.tower(), inputs) for each in (whole, resting))
        again = run_outputs(whole.tower(), inputs)
        # A model that draws lots gives no numbers to compare.
        _expect(torch.equal(one, other) or not torch.equal(one, again), "a block at a time gives other outputs")
        held = [block for block in resting.stack.blocks if any(one.device.type != "meta" for one in block.parameters())]
        _expect(not held, "a block read from disk stays in memory")


def block_count_agrees(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """The smaller config counts the kept blocks, and only its own stack shrank."""
    stack, config = smaller.stack, smaller.model.config
    _expect(stack.path == loaded.stack.path and len(stack) == len(plan.kept), "the stack has another length or path")
    counted = stack.owner(config).to_dict()[stack.count_field]
    _expect(
        (len(counted) if isinstance(counted, list) else counted) == len(plan.kept), "the config counts other blocks"
    )
    lengths = [{other.path: len(other) for other in find_stacks(one.model)[0]} for one in (loaded, smaller)]
    lengths[0][stack.path] = len(plan.kept)
    _expect(lengths[0] == lengths[1], "another stack changed its length")


def cut_equals_bypass(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """The smaller model computes what the original computes when the removed blocks pass their input on."""
    loaded, smaller = loaded.tower(), smaller.tower()
    inputs = probe_inputs(loaded, seed=5, num_sequences=3)
    count = hook_count(loaded.model)
    oracle = run_outputs(
        dataclasses.replace(loaded, model=without_blocks(loaded.model, loaded.stack.path, plan.removed)), inputs
    )
    found = _difference(run_outputs(smaller, inputs), oracle)
    _expect(found <= TOLERANCE, f"cut and bypass differ by {found:.3g}")
    with bypassed(loaded.stack, plan.removed):
        hooked = run_outputs(loaded, inputs)
    _expect(_difference(hooked, oracle) <= TOLERANCE, "the bypass by hooks and the bypass by replacement differ")
    _expect(hook_count(loaded.model) == count, "a hook stayed behind")
    if _difference(oracle, run_outputs(loaded, inputs)) <= 10 * TOLERANCE:
        raise VacuousProbeError(f"blocks {plan.removed} of `{loaded.stack.path}` do nothing in the tiny model")


def cached_generation_equals_uncached(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """Transformers' own greedy search finds the same tokens with its cache and without."""
    model = smaller.model
    if loaded.tower() is not loaded:
        return  # the text reads nothing of this tower
    if smaller.head not in ("causal", "seq2seq") or not model.can_generate():
        return
    inputs = {name: tensor[:1] for name, tensor in probe_inputs(smaller).items() if name != "decoder_input_ids"}
    settings: dict[str, Any] = {"max_new_tokens": NUM_GENERATED, "min_new_tokens": NUM_GENERATED, "do_sample": False}
    settings |= {"num_beams": 1, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    if getattr(model.config, "is_encoder_decoder", False):
        settings["decoder_start_token_id"] = 1
    try:
        whole = model.generate(**inputs, **settings, use_cache=False)
        # If the original cannot do it with a cache, that is not the cut's doing.
        cached = model.generate(**inputs, **settings, use_cache=True)
    except Exception:
        original = {name: tensor[:1] for name, tensor in probe_inputs(loaded).items() if name != "decoder_input_ids"}
        try:
            for use_cache in (False, True):
                loaded.model.generate(**original, **settings, use_cache=use_cache)
        except Exception:
            return
        raise
    if not torch.equal(cached.sequences, whole.sequences):
        # Some models compute another thing with a cache before any cut (FSMT, ProphetNet): not the cut's doing.
        logits = [loaded.model.generate(**inputs, **settings, use_cache=use).logits for use in (False, True)]
        error = max(float((one - other).abs().max()) for one, other in zip(*logits, strict=True))
        _expect(error > 1e-3, "cached and uncached generation differ")


def reload_gives_the_same_outputs(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """A stranger loads the saved folder strictly and gets the same outputs."""
    inputs = probe_inputs(loaded.tower(), seed=7)
    expected = run_outputs(smaller.tower(), inputs)
    fresh, problems = _saved_and_loaded(smaller)
    if problems and _saved_and_loaded(loaded)[1]:
        raise UnsupportedArchitectureError(
            "The original itself, saved and loaded again by transformers, lacks weights: what avss saves of it is "
            "withdrawn by its verification."
        )
    _expect(not problems, f"a fresh load found {problems}")
    again = smaller.with_model(fresh.eval())
    found = _difference(run_outputs(again.tower(), inputs), expected)
    if found > TOLERANCE and not _survives(loaded, inputs):
        raise VacuousProbeError("transformers does not give the tiny model itself back as it was saved")
    _expect(found <= TOLERANCE, f"the reloaded model differs by {found:.3g}")


def _saved_and_loaded(loaded: Loaded) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """A model as a stranger loads what is saved of it, and what the load complains about."""
    with tempfile.TemporaryDirectory() as folder:
        # Saving writes into the config of the model it is given.
        save_model(dataclasses.replace(loaded, model=copy.deepcopy(loaded.model)), Path(folder))
        fresh, info = type(loaded.model).from_pretrained(folder, output_loading_info=True)
    return fresh, {kind: sorted(map(str, keys))[:3] for kind, keys in info.items() if keys}


def _survives(loaded: Loaded, inputs: dict[str, Tensor]) -> bool:
    """Whether the original, nothing cut, is the same after saving and loading."""
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(loaded.model).save_pretrained(folder)
        fresh = loaded.with_model(type(loaded.model).from_pretrained(folder).eval())
    return _difference(run_outputs(fresh.tower(), inputs), run_outputs(loaded.tower(), inputs)) <= TOLERANCE


def ties_stay_tied(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """Weights shared between modules outside the stack are shared in the smaller model, and no others."""

    def ties(one: Loaded) -> set[tuple[str, ...]]:
        groups: dict[int, list[str]] = {}
        for name, parameter in one.model.named_parameters(remove_duplicate=False):
            if not name.startswith(f"{one.stack.path}."):
                groups.setdefault(id(parameter), []).append(name)
        return {tuple(names) for names in groups.values() if len(names) > 1}

    _expect(ties(loaded) == ties(smaller), "other weights are tied than before")


def original_is_untouched(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """Nothing of the given model changed, and kept blocks are shared, not copied."""
    owned = {tensor.data_ptr() for tensor in state_copy_pointers(loaded.model)}
    copied = [name for name, tensor in smaller.stack.blocks.named_parameters() if tensor.data_ptr() not in owned]
    _expect(not copied, f"weights were copied: {copied[:2]}")


def state_copy_pointers(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a model's state."""
    yield from model.state_dict().values()


def scores_do_not_depend_on_padding(loaded: Loaded, smaller: Loaded, plan: Plan) -> None:
    """Statistics of a padded batch are those of its rows alone."""
    if loaded.tower() is not loaded:
        return
    inputs = probe_inputs(loaded)
    if set(inputs) - {"input_ids", "attention_mask", "decoder_input_ids"} or "attention_mask" not in inputs:
        return
    statistic = Moments("update")
    keep = inputs["attention_mask"].bool()
    try:
        together = collect(loaded, [(inputs["input_ids"], keep)], [statistic]).summarise(statistic)
    except UnsupportedArchitectureError:
        return  # refused with its reason: it can be cut, not scored on text
    alone = collect(
        loaded,
        [(ids[None, mask], mask[None, mask]) for ids, mask in zip(inputs["input_ids"], keep, strict=True)],
        [statistic],
    ).summarise(statistic)
    if _depends_on_padding(loaded, inputs["input_ids"], keep):
        return  # the model does, whatever is cut: ConvBERT convolves over padding
    for name, values in together.items():
        scale = max(1e-9, float(abs(alone[name]).max()))
        found = float(abs(values - alone[name]).max()) / scale
        _expect(found <= 1e-3, f"`{name}` of the update depends on padding: {found:.3g}")


def _depends_on_padding(loaded: Loaded, token_ids: Tensor, keep: Tensor) -> bool:
    """Whether the model's own last hidden state at real tokens changes with the padding beside them."""
    whole = run_body(loaded, token_ids, keep)
    alone = run_body(loaded, token_ids[-1:, : int(keep[-1].sum())], None)
    found = whole[-1, : alone.shape[1]] if whole.dim() == alone.dim() == 3 else alone[0]
    return _difference(found, alone[0]) > 1e-3


LAWS: tuple[Callable[[Loaded, Loaded, Plan], None], ...] = (
    block_count_agrees,
    cut_equals_bypass,
    ties_stay_tied,
    original_is_untouched,
    reload_gives_the_same_outputs,
    cached_generation_equals_uncached,
    scores_do_not_depend_on_padding,
)
