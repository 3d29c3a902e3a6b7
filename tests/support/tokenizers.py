"""A tokenizer of whole words, small enough to read."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]", "[UNK]")
WORDS = [
    *("a", "the", "and", "or", "not", "but", ".", ",", "?"),
    *("cat", "dog", "bird", "fish", "tree", "river", "sun", "moon", "star", "rain", "snow", "wind", "fire", "stone"),
    *("road", "house", "door", "window", "red", "green", "blue", "old", "new", "big", "small", "fast", "slow"),
    *("sees", "hears", "finds", "loses", "takes", "gives", "opens", "closes", "likes", "fears"),
]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}


def word_tokenizer(*, adds: str = "", end: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at spaces and punctuation.

    Args:
        adds: What it puts around a text: nothing, `bos` (before it) or `cls` (`[CLS] ... [SEP]`).
        end: A token that comes after it with `bos`, where a model wants one.
    """
    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds == "bos":
        last = core.id_to_token(end) if end is not None else None
        around = ["[BOS]", *([last] if last is not None else [])]
        core.post_processor = processors.TemplateProcessing(
            single=f"[BOS] $A {last or ''}".strip(),
            pair=f"[BOS] $A $B {last or ''}".strip(),
            special_tokens=[(token, VOCABULARY[token]) for token in dict.fromkeys(around)],
        )
    elif adds == "cls":
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
