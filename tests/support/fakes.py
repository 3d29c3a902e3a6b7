"""Stand-ins for models whose every number is known."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from avss.models.load import Loaded
from avss.models.stack import BlockStack

ANSWERS = ("tensor", "tuple", "list", "model-output")
CALLS = ("position", "keyword")


class AddingBlock(nn.Module):
    """Adds a known vector to every token, and answers in the form asked for."""

    def __init__(self, vector: Tensor, answer: str = "tensor") -> None:
        super().__init__()
        self.register_buffer("vector", vector)
        self.answer = answer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = hidden_states + self.vector
        if self.answer == "tuple":
            return hidden, "an attention map"
        if self.answer == "list":
            return [hidden, "an attention map"]
        return BaseModelOutput(last_hidden_state=hidden) if self.answer == "model-output" else hidden


class AddingModel(nn.Module):
    """Embeds every token id as a row of a table, then passes it through `AddingBlock`s."""

    main_input_name = "input_ids"
    base_model_prefix = "model"

    def __init__(
        self, table: Tensor, vectors: Sequence[Tensor], answer: str = "tensor", call: str = "position"
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList(AddingBlock(vector, answer) for vector in vectors)
        self.call = call
        self.config = PretrainedConfig(num_hidden_layers=len(vectors), hidden_size=table.shape[1])

    def get_output_embeddings(self) -> None:
        """It is all body."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            output = layer(hidden_states=hidden) if self.call == "keyword" else layer(hidden)
            hidden = output if isinstance(output, Tensor) else output[0]
        return (hidden,)


def adding(
    num_blocks: int = 4, width: int = 6, vocabulary: int = 11, *, answer: str = "tensor", call: str = "position"
) -> tuple[Loaded, Tensor, list[Tensor]]:
    """A model of known numbers: (loaded, embedding table, the vector each block adds)."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn((vocabulary, width), generator=generator, dtype=torch.float64)
    # Very different sizes: a block that is mistaken for its neighbour gives another number.
    vectors = [torch.randn(width, generator=generator, dtype=torch.float64) * 3.0**index for index in range(num_blocks)]
    model: Any = AddingModel(table, vectors, answer, call).eval()
    return Loaded(model=model, tokenizer=None, head="encoder", source="fake"), table, vectors


def stack_of(*blocks: nn.Module) -> BlockStack:
    """A block stack of any modules."""
    return BlockStack(path="layers", blocks=nn.ModuleList(blocks), count_field="num_hidden_layers")
