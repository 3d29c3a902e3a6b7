"""The figures of a block's sub-layers, for analysis: what each site carries, and how much each part changes."""

from collections.abc import Callable, Sequence

from avss.errors import ConfigError, unknown_name
from avss.statistics.base import AbstractStatistic, FloatArray, Part, Site
from avss.statistics.change import CosineSimilarity, RelativeUpdate
from avss.statistics.collected import Summary
from avss.statistics.moments import Moments
from avss.statistics.near_zero import NearZero

SITES: dict[str, tuple[str, Site, Part | None]] = {
    "block": ("Block output", "output", "block"),
    "attention": ("Attention output", "attention", "attention"),
    "mlp": ("MLP output", "mlp", "mlp"),
    "mlp-activation": ("MLP activation", "mlp-activation", None),
}
"""Name -> title, where activations are looked at, and the part whose change of the stream is measured."""

THRESHOLD, PUBLISHED = 1e-2, 1e-5


def find_sites(names: str | Sequence[str]) -> tuple[str, ...]:
    """The sites of these names, each once; `all` stands for every one.

    Raises:
        ConfigError: A name is unknown, or none was given.
    """
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    if not wanted:
        raise ConfigError(f"No site was named. Allowed: {', '.join(SITES)}, or `all`.")
    expanded = [name for one in wanted for name in (SITES if one == "all" else (one,))]
    for name in expanded:
        if name not in SITES:
            raise ConfigError(unknown_name("site", name, [*SITES, "all"]))
    return tuple(dict.fromkeys(expanded))


def site_needs(name: str) -> tuple[AbstractStatistic, ...]:
    """The statistics behind a site's figures."""
    _, site, part = SITES[name]
    values = (Moments(site), NearZero(site, THRESHOLD), NearZero(site, PUBLISHED, relative=False))
    return values if part is None else (*values, CosineSimilarity(part), RelativeUpdate(part))


def site_values(name: str, summary: Callable[[AbstractStatistic], Summary]) -> dict[str, FloatArray]:
    r"""The figures of a site, one value per block.

    - `variance`: over all real tokens and units;
    - `near_zero`: share of values below 1e-2 of the token's root mean square;
    - `below_1e-5`: share below the published absolute threshold: where an activation function cuts off, real zeros;
    - `avss`: variance over `near_zero` (smoothed), the paper's ratio at this site;
    - `influence`: one minus the cosine of the stream before and after the part (not for the activation);
    - `update_norm`: length of what the part adds over length of the stream before it (not for the activation).

    Args:
        name: One of `SITES`.
        summary: Gives the summary of a statistic.
    """
    _, site, part = SITES[name]
    variance = summary(Moments(site))["variance"]
    near_zero = summary(NearZero(site, THRESHOLD))
    found = {
        "variance": variance,
        "near_zero": near_zero["share"],
        "below_1e-5": summary(NearZero(site, PUBLISHED, relative=False))["share"],
        "avss": variance / near_zero["smoothed_share"],
    }
    if part is not None:
        found["influence"] = 1 - summary(CosineSimilarity(part))["cosine"]
        found["update_norm"] = summary(RelativeUpdate(part))["ratio"]
    return found
