"""Scores and damage from images, in every family of vision models, against plain loops over a model of transformers."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import avss
from avss.composer.inputs import calibration
from avss.models.load import load_model
from tests.support.images import VISION, Vision, draw_images
from tests.support.oracles import hook_count, without_blocks

every_family = pytest.mark.parametrize("name", VISION)

NUM_IMAGES = 7
CRITERIA = "avss,block-influence,update-norm,angular-all,variance,magnitude,taylor,gradient-l2"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A family's model as a stranger loads it, and its folder."""

    vision: Vision
    folder: Path

    @functools.cached_property
    def tower(self) -> transformers.PreTrainedModel:
        model = getattr(transformers, self.vision.class_name).from_pretrained(self.folder).eval()
        return model.get_submodule(self.vision.tower) if self.vision.tower else model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.tower.get_submodule(self.vision.blocks)

    def inputs(self, files: list[Path]) -> list[dict[str, Tensor]]:
        processor = transformers.AutoImageProcessor.from_pretrained(self.folder)
        return [dict(processor(images=Image.open(file).convert("RGB"), return_tensors="pt")) for file in files]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    root = tmp_path_factory.mktemp("vision")

    @functools.cache
    def of(name: str) -> Saved:
        return Saved(VISION[name], VISION[name].save(root / name))

    return of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "pictures", NUM_IMAGES)


def files_of(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


@torch.no_grad()
def plain_states(saved: Saved, files: list[Path]) -> list[tuple[Tensor, Tensor]]:
    """For each block, its input and its output at every place of every image, `[N, D]` in double precision."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in saved.blocks]
    for inputs in saved.inputs(files):
        states = saved.tower(**inputs, output_hidden_states=True).hidden_states
        for index, block in enumerate(saved.blocks):
            # Of the last block, transformers lists the output after the final norm of some families.
            others = {"attention_mask": None} if "attention_mask" in inspect.signature(block.forward).parameters else {}
            after = block(states[index], **others)
            after = after[0] if isinstance(after, tuple) else after
            if index + 1 < len(saved.blocks):
                torch.testing.assert_close(after, states[index + 1])
            seen[index].append((states[index][0].double(), after[0].double()))
    return [(torch.cat([x for x, _ in one]), torch.cat([y for _, y in one])) for one in seen]


def by_formula(criterion: str, before: Tensor, after: Tensor) -> float:
    update = after - before
    cosine = torch.cosine_similarity(before, after, dim=-1)
    if criterion == "block-influence":
        return float(1 - cosine.mean())
    if criterion == "update-norm":
        return float((update.norm(dim=-1) / before.norm(dim=-1)).mean())
    if criterion == "angular-all":
        return float((cosine.clamp(-1, 1).arccos() / torch.pi).mean())
    if criterion == "variance":
        return float(after.var(correction=0))
    assert criterion == "avss"
    unchanged = (update.abs() < 0.03 * before.abs()).sum()
    return float((update.var(-1) / before.var(-1)).mean() / ((unchanged + 1) / (update.numel() + 2)))


@every_family
def test_scores_equal_a_loop_over_the_model(name, saved, pictures):
    folder, stack = saved(name).folder, VISION[name].stack
    table = avss.score(str(folder), str(pictures), stack=stack, criteria=CRITERIA, batch_size=3)
    states = plain_states(saved(name), files_of(pictures))
    for criterion in ("avss", "block-influence", "update-norm", "angular-all", "variance"):
        expected = [by_formula(criterion, *one) for one in states]
        assert table[criterion].values == pytest.approx(expected, rel=1e-4), criterion
    sizes = [sum(float(p.detach().abs().sum()) for p in block.parameters() if p.dim() > 1) for block in
             saved(name).blocks]  # fmt: skip
    assert table["magnitude"].values == pytest.approx(sizes, rel=1e-5)
    assert table.data is not None
    assert (table.data.layout, table.data.unit) == ("images", "images")
    assert table.data.num_sequences == NUM_IMAGES
    assert table.data.num_tokens == len(states[0][0])
    assert table.data.image_size == (16, 16)


@pytest.mark.parametrize(("drop", "name"), [(True, "vit"), (False, "vit"), (True, "siglip")])
def test_the_first_place_can_be_left_out(drop, name, saved, pictures):
    table = avss.score(str(saved(name).folder), str(pictures), criteria="block-influence", first_token=not drop)
    num_places = table.data.seq_len
    expected = []
    for before, after in plain_states(saved(name), files_of(pictures)):
        kept = [row for row in range(len(before)) if not drop or row % num_places]
        expected.append(by_formula("block-influence", before[kept], after[kept]))
    assert table["block-influence"].values == pytest.approx(expected, rel=1e-4)


def test_gradients_are_of_the_classifiers_own_answer(saved, pictures):
    one = saved("vit")
    table = avss.score(str(one.folder), str(pictures), criteria="taylor,gradient-l2", batch_size=NUM_IMAGES)
    pixels = torch.cat([inputs["pixel_values"] for inputs in one.inputs(files_of(pictures))])
    logits = one.tower(pixel_values=pixels).logits
    torch.nn.functional.cross_entropy(logits, logits.argmax(-1)).backward()
    taylor = [
        sum(float((p.detach() * p.grad).abs().sum()) for p in block.parameters() if p.dim() > 1) for block in one.blocks
    ]
    square = [sum(float(p.grad.square().sum()) for p in block.parameters() if p.dim() > 1) for block in one.blocks]
    one.tower.zero_grad(set_to_none=True)
    assert table["taylor"].values == pytest.approx(taylor, rel=1e-4)
    assert table["gradient-l2"].values == pytest.approx(np.sqrt(square), rel=1e-4)


@torch.no_grad()
def plain_damage(saved: Saved, removed: int, files: list[Path]) -> float:
    """Mean over images of the KL divergence of labels, or of one minus the cosine of mean states."""
    cut = without_blocks(saved.tower, saved.vision.blocks, [removed])
    found = []
    for inputs in saved.inputs(files):
        dense, other = saved.tower(**inputs), cut(**inputs)
        if "logits" in dense:
            p, q = dense.logits[0].double().softmax(-1), other.logits[0].double().softmax(-1)
            found.append(float((p * (p / q).log()).sum()))
        else:
            means = [answer.last_hidden_state[0].double().mean(0) for answer in (dense, other)]
            found.append(1 - float(torch.cosine_similarity(*means, dim=-1)))
    return float(np.mean(found))


@every_family
def test_damage_equals_models_without_the_block(name, saved, pictures):
    table = avss.damage(str(saved(name).folder), str(pictures), stack=VISION[name].stack)
    expected = [plain_damage(saved(name), block, files_of(pictures)) for block in range(len(saved(name).blocks))]
    assert table.values == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert table.measure == ("kl" if name == "vit" else "cosine")


@every_family
def test_the_lowest_scores_go_and_the_cut_is_verified(name, saved, pictures, tmp_path):
    folder, stack = str(saved(name).folder), VISION[name].stack
    scores = avss.score(folder, str(pictures), stack=stack, criteria="block-influence")["block-influence"]
    pruned = avss.prune(folder, count=2, protect="none", data=str(pictures), stack=stack, out=tmp_path / "smaller")
    assert pruned.plan.removed == tuple(sorted(scores.ranking()[:2]))
    assert pruned.record.cuts[0].verification.passed
    assert pruned.record.data.content_hash == avss.score(folder, str(pictures), stack=stack).data.content_hash
    again = avss.score(str(tmp_path / "smaller"), str(pictures), stack=stack, criteria="block-influence")
    assert len(again["block-influence"].values) == len(scores.values) - 2


@pytest.mark.parametrize("name", ["vit", "llava"])
def test_looking_leaves_the_model_as_it_was(name, saved, pictures):
    loaded = load_model(saved(name).folder, stack=VISION[name].stack)
    count = hook_count(loaded.model)
    avss.score(loaded, str(pictures), criteria=CRITERIA, sites="all")
    assert hook_count(loaded.model) == count
    assert not any(parameter.grad is not None for parameter in loaded.model.parameters())


def test_sites_look_at_what_each_part_writes(saved, pictures):
    one = saved("vit")
    table = avss.score(str(one.folder), str(pictures), sites="attention,mlp", criteria="first")
    written: dict[tuple[str, int], list[Tensor]] = {}
    hooks = []
    for index, block in enumerate(one.blocks):
        maps = [(path, part) for path, part in block.named_modules() if isinstance(part, nn.Linear)]
        last = {"attention": [part for path, part in maps if "attention" in path][-1], "mlp": maps[-1][1]}
        for site, part in last.items():

            def note(_, __, output, key=(site, index)):
                written.setdefault(key, []).append(output.detach().double())

            hooks.append(part.register_forward_hook(note))
    for inputs in one.inputs(files_of(pictures)):
        one.tower(**inputs)
    for hook in hooks:
        hook.remove()
    for figures in table.sites:
        expected = [
            float(torch.cat(written[figures.site, index]).var(correction=0)) for index in range(len(one.blocks))
        ]
        assert figures.values["variance"] == pytest.approx(expected, rel=1e-4)


def test_batches_are_the_processors_pixels_and_all_places_count(saved, pictures):
    loaded = load_model(saved("vit").folder)
    batches = calibration(loaded, str(pictures), batch_size=3)
    assert [len(keep) for _, keep in batches] == [3, 3, 1]
    drawn = torch.cat([inputs["pixel_values"] for inputs, _ in batches])
    plain = torch.cat([inputs["pixel_values"] for inputs in saved("vit").inputs(files_of(pictures))])
    assert sorted(map(float, drawn.flatten(1).sum(1))) == pytest.approx(sorted(map(float, plain.flatten(1).sum(1))))
    # 4 x 4 patches and the class token.
    assert all(keep.shape[1] == 17 and bool(keep.all()) for _, keep in batches)


def test_the_draw_is_a_function_of_the_seed_and_the_size_of_batches_does_not_matter(saved, pictures):
    folder = str(saved("dinov2").folder)
    one, same, other = (
        avss.score(folder, str(pictures), samples=4, seed=seed, batch_size=size, criteria="avss")
        for seed, size in ((0, 1), (0, 4), (3, 4))
    )
    assert one.data.content_hash == same.data.content_hash != other.data.content_hash
    assert one["avss"].values == pytest.approx(same["avss"].values, rel=1e-5)
    assert one.data.num_sequences == 4


def test_half_precision_reads_the_same_images(saved, pictures):
    folder = str(saved("vit").folder)
    whole = avss.score(load_model(folder), str(pictures), criteria="update-norm")
    half = avss.score(load_model(folder, dtype="bfloat16"), str(pictures), criteria="update-norm")
    assert half.data.content_hash == whole.data.content_hash
    assert half["update-norm"].values == pytest.approx(whole["update-norm"].values, rel=0.05)
