"""Numbers for people: how the tables, the page and the model card write a figure.

One rule everywhere: a value carries as many digits as its standard error supports, what is missing reads `n/a`, and
large numbers are grouped, not written in powers of ten.
"""

import math

MISSING = "n/a"
"""What stands where there is no number."""

_GROUPED_UP_TO = 1e12  # beyond it, grouped digits are counted, not read
_PLAIN_DOWN_TO = 1e-3


def is_number(value: float | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """A figure without an error.

    Args:
        value: Any unit; None and nan read `n/a`.
        digits: Significant digits, for magnitudes from 0.001 to 1000; larger ones are rounded to integers.

    Example:
        >>> [number(value) for value in (36.0712, 71418.3, 1.2e-7, 0.0, None)]
        ['36.07', '71,418', '1.2e-07', '0', 'n/a']
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= _GROUPED_UP_TO:
        return f"{value:.2e}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if size < _PLAIN_DOWN_TO:
        return f"{value:.1e}"
    return f"{value:#.{digits}g}".rstrip(".")


def with_error(value: float | None, stderr: float | None) -> str:
    """A figure and its standard error, both to the second significant digit of the error.

    Args:
        value: Any unit.
        stderr: Standard error in the same unit; None or nan: the value stands alone.

    Example:
        >>> with_error(36.0712, 0.8134), with_error(71418.3, 1204.0), with_error(0.5, None)
        ('36.07 ± 0.81', '71,418 ± 1,204', '0.5000')
    """
    if value is None or not math.isfinite(value) or stderr is None or not math.isfinite(stderr):
        return number(value)
    if stderr <= 0:
        return f"{number(value)} ± 0"
    decimals = 1 - math.floor(math.log10(float(f"{stderr:.1e}")))
    if decimals > 5 or abs(value) >= _GROUPED_UP_TO:
        power = math.floor(math.log10(max(abs(value), stderr)))
        places = max(decimals + power, 0)
        return f"({value / 10**power:.{places}f} ± {stderr / 10**power:.{places}f})e{power:+03d}"
    decimals = max(decimals, 0)
    return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}"


def percent(share: float | None, stderr: float | None = None) -> str:
    """A share as a percentage with one digit, or with the digits that its error supports.

    Example:
        >>> percent(0.9312), percent(0.9312, 0.0123), percent(math.nan)
        ('93.1 %', '93.1 ± 1.2 %', 'n/a')
    """
    if share is None or not math.isfinite(share):
        return MISSING
    if stderr is None or not math.isfinite(stderr):
        return f"{100 * share:,.1f} %"
    return f"{with_error(100 * share, 100 * stderr)} %"


def change(before: float, after: float) -> str:
    """The relative change from one value to the other, with its sign.

    Example:
        >>> change(30, 23), change(0, 1)
        ('-23.3 %', 'n/a')
    """
    return MISSING if before == 0 or not math.isfinite(after / before) else f"{100 * (after / before - 1):+,.1f} %"


def times(ratio: float | None, stderr: float | None = None) -> str:
    """How many times: three significant digits, or as many as the error supports.

    Example:
        >>> times(2.803), times(1980.4), times(2.803, 0.051), times(None)
        ('2.80x', '1,980x', '2.803 ± 0.051x', 'n/a')
    """
    if ratio is None or not math.isfinite(ratio):
        return MISSING
    return f"{with_error(ratio, stderr) if stderr is not None and math.isfinite(stderr) else number(ratio, 3)}x"


def size(num_bytes: float | None) -> str:
    """A size in decimal units: kB, MB, GB, TB.

    Example:
        >>> size(269_060_552), size(16_060_522_240), size(512)
        ('269 MB', '16.1 GB', '512 B')
    """
    return MISSING if num_bytes is None else _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(total: float | None) -> str:
    """A large count, short: thousand (K), million (M), billion (B).

    Example:
        >>> count(134_515_008), count(8_030_261_248), count(30)
        ('135 M', '8.03 B', '30')
    """
    return MISSING if total is None else _scaled(total, ("", "K", "M", "B", "T"))


def duration(seconds: float | None) -> str:
    """A wall time.

    Example:
        >>> duration(0.834), duration(12.3), duration(200), duration(3900)
        ('0.834 s', '12.3 s', '3 min 20 s', '1 h 5 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def quantity(value: float | None, unit: str, stderr: float | None = None) -> str:
    """A measurement with its unit; bytes become MB or GB.

    Example:
        >>> quantity(12.31, "ms", 0.42), quantity(2.69e8, "bytes"), quantity(3.5861, "nats", 0.0225)
        ('12.31 ± 0.42 ms', '269 MB', '3.586 ± 0.022 nats')
    """
    if unit == "bytes":
        return size(value) if is_number(value) else MISSING
    text = with_error(value, stderr)
    return f"{text} {unit}" if unit and text != MISSING else text


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return MISSING
    step = 0
    # 999.5 would round to a fourth digit
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    text = f"{value:.0f}" if step == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{text} {units[step]}".strip()
