"""The explicit list of criteria. A new one is added here and nowhere else; the law tests pick it up."""

from avss.criteria.angles import Angular, AngularAll
from avss.criteria.avss import Avss, AvssPaper, AvssProduct, AvssReference
from avss.criteria.base import AbstractCriterion
from avss.criteria.baselines import First, Last, Random
from avss.criteria.change import BlockInfluence, UpdateNorm
from avss.criteria.factors import Sparsity, Variance
from avss.criteria.gradients import GradientL1, GradientL2, Taylor
from avss.criteria.magnitude import Magnitude, MagnitudeL2
from avss.errors import ConfigError, unknown_name

CRITERIA: dict[str, AbstractCriterion] = {
    criterion.name: criterion
    for criterion in (
        Avss(),
        AvssPaper(),
        AvssReference(),
        AvssProduct(),
        Variance(),
        Sparsity(),
        BlockInfluence(),
        UpdateNorm(),
        Angular(),
        AngularAll(),
        Taylor(),
        GradientL1(),
        GradientL2(),
        Magnitude(),
        MagnitudeL2(),
        First(),
        Last(),
        Random(),
    )
}
"""Name -> criterion with its default settings."""


def find_criteria(names: str | list[str] | tuple[str, ...]) -> tuple[AbstractCriterion, ...]:
    """The criteria of these names, in this order, each once; `all` stands for every one.

    Raises:
        ConfigError: A name is unknown (near matches are offered), or none was given.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    if not wanted:
        raise ConfigError(f"No criterion was named. Allowed: {', '.join(sorted(CRITERIA))}, or `all`.")
    expanded = [name for one in wanted for name in (CRITERIA if one == "all" else (one,))]
    for name in expanded:
        if name not in CRITERIA:
            raise ConfigError(unknown_name("criterion", name, [*CRITERIA, "all"]))
    return tuple(CRITERIA[name] for name in dict.fromkeys(expanded))
