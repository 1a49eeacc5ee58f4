"""Where commands print their tables."""

from rich.console import Console

WIDTH = 125
"""Columns of tables where the terminal has fewer, as logs and srun have: figures are not cut."""


def table_console() -> Console:
    """Return a console of the terminal's width, but no narrower than `WIDTH`."""
    console = Console()
    return Console(width=max(console.width, WIDTH))
