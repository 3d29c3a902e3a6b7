"""How fast a model is: time of a short forward pass, tokens a second in a batch, time of a generated token."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from avss.config import TaskConfig
from avss.data.batches import Inputs
from avss.evaluation.base import OnStep, Steps, TaskResult, max_len, task_name
from avss.models.forward import cache_name, run_body, run_outputs
from avss.models.load import Loaded
from avss.models.probe import probe_inputs
from avss.record import Measurement

NUM_TOKENS = 128
"""Length of every sequence that is timed."""
DECODED_TOKENS = 16
"""Tokens generated in one repeat."""
MIN_REPEATS = 3
MAX_REPEATS = 50
SECONDS_PER_MODEL = 5.0

Timer = Callable[[Loaded], float]
"""Does one piece of work with a model and returns the seconds it took."""


def evaluate_speed(models: Sequence[Loaded], task: TaskConfig, on_step: OnStep) -> list[TaskResult]:
    """Times the models on random tokens or images.

    The models take turns, so that a machine that slows down slows all of them.

    - `latency_ms`: forward pass of one sequence of 128 tokens (fewer, if the model takes fewer) or one image, in ms.
    - `throughput`: tokens or images a second in the forward pass of `task.batch_size` of them.
    - `decode_ms_per_token`: time of each of 16 tokens generated after 128, with cache, in ms; causal heads only, and
      only where all of the models have a cache.

    Each is the median over 3 to 50 repeats, after one that does not count; about 5 seconds a model in all, more where 3
    repeats take longer. The standard error is that of the median of normal values with a robust spread,
    $1.2533 * 1.4826 * MAD / sqrt(n)$, so that a single disturbance does not count.
    """
    for model in models:
        model.check_in_memory("A measurement of speed")
    length = min(NUM_TOKENS, max_len(models) or NUM_TOKENS)
    sees = models[0].is_vision
    batch = _random_images(models, task) if sees else _random_tokens(models, task.batch_size, length, task.seed)
    size, unit = (len(batch), "images/s") if sees else (batch.numel(), "tokens/s")
    timers: dict[str, Timer] = {
        "latency_ms": lambda model: _time_forward(model, batch[:1]),
        "throughput": lambda model: _time_forward(model, batch),
    }
    decoded = min(DECODED_TOKENS, length - 1)
    prompt = batch[:1, : length - decoded]
    if models[0].head == "causal" and all(_has_cache(model, prompt) for model in models):
        timers["decode_ms_per_token"] = lambda model: _time_decoding(model, prompt, decoded)
    steps = Steps(len(timers) * MIN_REPEATS * len(models), on_step)
    seconds = {
        metric: _take_turns(models, timer, SECONDS_PER_MODEL / len(timers), steps) for metric, timer in timers.items()
    }
    return [
        TaskResult(tuple(_measurement(task, metric, seconds[metric][place], size, unit) for metric in timers))
        for place in range(len(models))
    ]


def median_error(values: np.ndarray) -> float | None:
    """The standard error of the median, see `evaluate_speed`; None for fewer than two values.

    Example:
        >>> round(median_error(np.array([1.0, 2.0, 3.0, 4.0, 500.0])), 3)  # the median deviation is 1
        0.831
    """
    if len(values) < 2:
        return None
    spread = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    return math.sqrt(math.pi / 2) * spread / math.sqrt(len(values))


def _random_tokens(models: Sequence[Loaded], num_sequences: int, length: int, seed: int) -> Tensor:
    config = models[0].model.config.get_text_config()
    vocabulary = min(model.model.config.get_text_config().vocab_size for model in models)
    token_ids = torch.from_numpy(np.random.default_rng(seed).integers(vocabulary, size=(num_sequences, length)))
    end = getattr(config, "eos_token_id", None)
    if models[0].head == "classifier" and isinstance(end, int):
        # Bart's classifiers read the last end of text and want as many in every sequence.
        token_ids[token_ids == end] = (end + 1) % vocabulary
        token_ids[:, -1] = end
    return token_ids


def _random_images(models: Sequence[Loaded], task: TaskConfig) -> Tensor:
    """Images of the size that the config names, `[B, channel, height, width]`."""
    return probe_inputs(models[0], num_sequences=task.batch_size, seed=task.seed)["pixel_values"]


def _take_turns(models: Sequence[Loaded], timer: Timer, budget: float, steps: Steps) -> list[np.ndarray]:
    """The seconds of each repeat, for each model."""
    for model in models:
        timer(model)
    seconds: list[list[float]] = [[] for _ in models]
    start = time.perf_counter()
    for repeat in range(MAX_REPEATS):
        if repeat >= MIN_REPEATS and time.perf_counter() - start > budget * len(models):
            break
        for model, own in zip(models, seconds, strict=True):
            own.append(timer(model))
            if repeat < MIN_REPEATS:
                steps.advance()
    return [np.array(own) for own in seconds]


def _time_forward(model: Loaded, batch: Tensor) -> float:
    inputs: Inputs = {"pixel_values": batch.to(model.device)} if model.is_vision else batch.to(model.device)
    # A decoder that classifies refuses a batch without a padding token; its head is next to nothing.
    run = run_body if model.pad_id is None else run_outputs
    start = _now(model)
    run(model, inputs)
    return _now(model) - start


@torch.inference_mode()
def _has_cache(model: Loaded, prompt: Tensor) -> bool:
    """Whether a model that has read a prompt returns a cache of it."""
    name = cache_name(model.model)
    if name is None:
        return False
    outputs = model.model(input_ids=prompt.to(model.device), use_cache=True)
    return getattr(outputs, name, None) is not None


@torch.inference_mode()
def _time_decoding(model: Loaded, prompt: Tensor, num_tokens: int) -> float:
    """Seconds for `num_tokens` steps with the model's cache; reading the prompt does not count."""
    name = cache_name(model.model)
    assert name is not None
    outputs = model.model(input_ids=prompt.to(model.device), use_cache=True)
    start = _now(model)
    for _ in range(num_tokens):
        step = outputs.logits[:, -1:].argmax(-1)
        outputs = model.model(input_ids=step, use_cache=True, **{name: outputs[name]})
    return (_now(model) - start) / num_tokens


def _now(model: Loaded) -> float:
    # An accelerator works on after the call has returned.
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _measurement(task: TaskConfig, metric: str, seconds: np.ndarray, size: int, unit: str) -> Measurement:
    median, error = float(np.median(seconds)), median_error(seconds)
    if metric == "throughput":
        value = size / median
        # Delta method: the relative error stays.
        scaled_error = None if error is None else value * error / median
    else:
        value, scaled_error, unit = 1000 * median, None if error is None else 1000 * error, "ms"
    return Measurement(
        task=task_name(task),
        metric=metric,
        value=value,
        stderr=scaled_error,
        num_samples=len(seconds),
        higher_is_better=metric == "throughput",
        unit=unit,
    )
