"""Outcomes of the sweep -> `docs/architectures.md`."""

from collections.abc import Iterable
from typing import Any

_HEADINGS = {
    "causal": "Language models",
    "masked": "Masked language models",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Image classifiers",
    "speech": "Speech to text",
    "speech-to-text": "Speech to text, without a decoder",
    "audio": "Sound classifiers",
    "image-text": "Image and text to text",
    "classifier": "Text classifiers",
}
PLACES = ("first", "middle", "last", "scattered")


def chosen_cuts(result: dict[str, Any]) -> dict[str, str]:
    """The cuts of the stack that avss takes by itself; of the first one that can be cut, where that one cannot."""
    stacks = result["stacks"]
    return next((stack["cuts"] for stack in stacks if stack["chosen"]), stacks[0]["cuts"])


def outcome(result: dict[str, Any]) -> str:
    """`passed`, `limited` (every law holds for the cuts that are not refused), `refused`, `unbuilt` or `broken`."""
    if result["outcome"] != "judged":
        return result["outcome"]
    passed = [text == "passed" for text in chosen_cuts(result).values()]
    return "passed" if all(passed) else "limited" if any(passed) else "refused"


def render(results: list[dict[str, Any]], version: str) -> str:
    """The whole page."""
    types: dict[str, set[str]] = {}
    for result in results:
        types.setdefault(outcome(result), set()).add(result["type"])
    passed = types.get("passed", set())
    limited = types.get("limited", set()) - passed
    refused = types.get("refused", set()) - passed - limited
    unbuilt = types.get("unbuilt", set()) - passed - limited - refused
    lines = [
        "# Architectures",
        "",
        f"Written by `make sweep` with transformers {version}; do not edit. Each model type was built tiny from its "
        "config and lost its first block, one in the middle, its last and two scattered ones. Every cut that was made "
        "obeys every law: the block count agrees, an empty plan changes no bit, cut = bypass, ties stay ties, kept "
        "weights are shared, a fresh strict load gives the same outputs, cached = uncached generation, scores do not "
        "depend on padding, no hook stays behind, and with its blocks on disk the whole model gives the same outputs.",
        "",
        "What a type cannot do whole, it is not asked for cut: generation is compared where the original generates the "
        "same with its cache as without, padding where the original's own outputs do not depend on it. Text "
        "classifiers, whose bodies stand above, and further stacks lost two scattered blocks only.",
        "",
        "| outcome | model types |",
        "| --- | --- |",
        f"| passed: every cut tried, every law | {len(passed)} |",
        "| passed with limits: every law for the cuts that are possible, the others refused with the reason | "
        f"{len(limited)} |",
        f"| refused, with the reason | {len(refused)} |",
        f"| could not be built small | {len(unbuilt)} |",
        f"| broken: a cut was made and a law failed | {len(types.get('broken', set()))} |",
        "",
        "A type counts once, by its best class. The stack named is the one that avss takes by itself; `+` names "
        "further stacks of the model, each followed by what became of the same cuts there.",
    ]
    for kind, heading in _HEADINGS.items():
        rows = [result for result in results if result["kind"] == kind]
        if rows:
            lines += ["", f"## {heading}", "", "| model type | class | stack | outcome |", "| --- | --- | --- | --- |"]
            lines += [_row(result) for result in rows]
    return "\n".join(lines) + "\n"


def _row(result: dict[str, Any]) -> str:
    head = f"| {result['type']} | {result['class']} |"
    if result["outcome"] != "judged":
        words = {"unbuilt": "cannot be built small: ", "refused": "refused: ", "broken": "**broken**: "}
        return f"{head}  | {_cell(words[result['outcome']] + result['reason'])} |"
    main = next((stack for stack in result["stacks"] if stack["chosen"]), result["stacks"][0])
    text = _cuts(main["cuts"])
    for stack in result["stacks"]:
        if stack is not main:
            text += f"<br>+ {stack['name']}: {_cuts(stack['cuts'])}"
    return f"{head} `{main['path']}` | {_cell(text)} |"


def _cuts(cuts: dict[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for place, text in cuts.items():
        reasons.setdefault(text, []).append(place)
    if set(reasons) == {"passed"}:
        return "passed"
    if "passed" not in reasons and len(reasons) == 1:
        return f"refused: {next(iter(reasons))}"
    return "; ".join(_part(text, places) for text, places in _passed_first(reasons))


def _passed_first(reasons: dict[str, list[str]]) -> Iterable[tuple[str, list[str]]]:
    return sorted(reasons.items(), key=lambda item: item[0] != "passed")


def _part(text: str, places: list[str]) -> str:
    where = ", ".join(places)
    return f"passed ({where})" if text == "passed" else f"refused ({where}): {text}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
