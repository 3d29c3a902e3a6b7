"""How far a smaller model's embeddings are from the dense model's: needs no labels, works for every head."""

from collections.abc import Sequence

import numpy as np

from avss.config import TaskConfig
from avss.data.sources import read_texts
from avss.errors import DataError
from avss.evaluation.base import OnStep, TaskResult, data_source, draw, measure, short_source
from avss.evaluation.embedding import cosine, embed, encode_texts
from avss.evaluation.items import AbstractItems, image_files, image_items
from avss.models.load import Loaded

_ROWS_AT_ONCE = 1024


def evaluate_similarity(models: Sequence[Loaded], task: TaskConfig, on_step: OnStep) -> list[TaskResult]:
    """Compares the embeddings of the paragraphs or images of the data with those of the dense model, `models[0]`.

    An embedding is the hidden state after the last block, pooled as the model's sentence-transformers files say; the
    mean over the real tokens where there are none. Texts are cut to `task.seq_len` tokens. Metrics:

    - `cosine`: mean cosine between a text's embedding and the dense model's of the same text; 1 for the dense model.
    - `neighbour_agreement`: share of texts whose nearest other text, by cosine, is the same as for the dense model.
      This is what retrieval and clustering feel; a common shift of all embeddings, which the cosine shows, does not
      matter. The texts share their neighbours, so its standard error is a little too small.

    Raises:
        DataError: The data are missing, or have fewer than three texts.
        TaskError: The models' vocabularies differ, or a pooling is not known.
    """
    items = _items(models, task)
    dense, *others = embed(models, items, batch_size=task.batch_size, on_step=on_step)
    reference = nearest(dense)
    return [_result(task, cosine(dense, one), nearest(one) == reference) for one in (dense, *others)]


def _items(models: Sequence[Loaded], task: TaskConfig) -> AbstractItems:
    images = image_files(task) if models[0].is_vision else ()
    texts = () if images else read_texts(data_source(task), task.text_column).paragraphs()
    chosen = draw(len(images or texts), task.limit, task.seed)
    if len(chosen) < 3:
        what, more = ("images", "images") if images else ("texts", "paragraphs")
        raise DataError(
            f"`{short_source(task)}` gives {len(chosen)} {what} to compare. At least three are needed, or there is no "
            f"choice of neighbour; give more {more} or a larger `limit`."
        )
    if images:
        return image_items(models, [images[index] for index in chosen])
    return encode_texts(models, [texts[index] for index in chosen], limit=task.seq_len)


def nearest(vectors: np.ndarray) -> np.ndarray:
    """The index of each row's nearest other row by cosine, `[N]`; the first of equals."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms != 0)
    found = np.empty(len(units), dtype=np.int64)
    for start in range(0, len(units), _ROWS_AT_ONCE):
        similarity = units[start : start + _ROWS_AT_ONCE] @ units.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        found[start : start + len(similarity)] = similarity.argmax(1)
    return found


def _result(task: TaskConfig, cosines: np.ndarray, agrees: np.ndarray) -> TaskResult:
    samples = {"cosine": cosines, "neighbour_agreement": agrees.astype(np.float64)}
    measured = (measure(task, metric, values, higher_is_better=True) for metric, values in samples.items())
    return TaskResult(measurements=tuple(measured), samples=samples)
