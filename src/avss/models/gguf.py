"""Reading GGUF through transformers without its repeated work.

transformers parses the file once for the config, once for the weights and once for the tokenizer, and builds the same
name map once for every module: half a minute for a 100 MB file. Inside `shared_reader` both happen once.
"""

import contextlib
import functools
from collections.abc import Iterator

import gguf
from transformers import modeling_gguf_pytorch_utils


@contextlib.contextmanager
def shared_reader() -> Iterator[None]:
    """Lets transformers read each GGUF file once while the context is open, and without a progress bar of its own."""
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    bar = modeling_gguf_pytorch_utils.tqdm  # pyright: ignore[reportPrivateImportUsage]
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)  # pyright: ignore[reportAttributeAccessIssue]
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=4)(name_map)
    modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)  # pyright: ignore
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map  # pyright: ignore[reportAttributeAccessIssue]
        modeling_gguf_pytorch_utils.tqdm = bar  # pyright: ignore[reportPrivateImportUsage]
