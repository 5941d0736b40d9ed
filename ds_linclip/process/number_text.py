"""Numbers as people read them, in progress bars, tables and messages."""

__all__ = ["format_figure"]


def format_figure(value: float) -> str:
    """Return a number with three significant digits, or all before the point."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
