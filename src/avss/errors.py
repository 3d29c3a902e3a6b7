"""What can go wrong, and whose turn it is.

    AvssError
    ├── UserError                     the reader can fix it: one sentence, exit code 2, no traceback
    │   ├── ConfigError               a setting or a flag
    │   ├── DataError                 a text, a table, a column
    │   ├── ModelLoadError            a model that cannot be read
    │   ├── UnsupportedArchitectureError   a stack that cannot be cut, and why
    │   ├── InvalidPlanError          a plan that removes what is not there, or everything
    │   ├── OutputExistsError         a folder that would be overwritten
    │   ├── TaskError                 a task that this model cannot do
    │   └── NumericalError            a number that does not exist for this input
    │       ├── NoObservationsError
    │       └── DegenerateStatisticError
    └── VerificationError             the result was not what was promised: withdrawn, exit code 1

Every message has the same three parts: what is wrong (the value in backticks), what is allowed, what to do.
"""

import difflib
from collections.abc import Iterable


class AvssError(Exception):
    """Anything that `avss` raises on purpose."""


class UserError(AvssError):
    """The reader can fix it. Shown as one sentence without a traceback; exit code 2."""


class ConfigError(UserError):
    """A setting is unknown, out of range, or at odds with another one."""


class DataError(UserError):
    """A text, a table or an image is missing, empty, or not what it says."""


class ModelLoadError(UserError):
    """A model or tokenizer cannot be read."""


class UnsupportedArchitectureError(UserError):
    """The block stack was not found, or cannot be cut without changing what the rest computes."""


class InvalidPlanError(UserError):
    """A plan names blocks that do not exist, removes none or removes all."""


class OutputExistsError(UserError):
    """The output folder exists and `--force` was not given."""


class TaskError(UserError):
    """An evaluation task does not fit the model or its data."""


class NumericalError(UserError):
    """A number is undefined for this input; another setting or more text gives one."""


class NoObservationsError(NumericalError):
    """Nothing was observed: no sequence, or every token masked."""


class DegenerateStatisticError(NumericalError):
    """A statistic took a value for which the criterion is undefined."""


class VerificationError(AvssError):
    """The saved model is not the model that was promised. The output has been withdrawn; exit code 1."""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The sentence for a name that is not in a list: near matches first, then the whole list.

    Example:
        >>> unknown_name("criterion", "blok-influence", ["avss", "block-influence"])
        'Unknown criterion `blok-influence`. Did you mean `block-influence`? Allowed: avss, block-influence.'
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(f'`{match}`' for match in near)}?" if near else ""
    return f"Unknown {kind} `{name}`.{hint} Allowed: {', '.join(names)}."
