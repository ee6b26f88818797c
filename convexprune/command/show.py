"""What the commands share: a sentence for what is wrong, a progress bar, and a report on the terminal."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from convexprune.extras import extras
from convexprune.report import Report


class Wrong(click.ClickException):
    """Wrong input is a sentence and exit code 2."""

    exit_code = 2


@contextmanager
def reported() -> Iterator[None]:
    """Wrong input and full disks are a sentence and an exit code, not a traceback."""
    try:
        yield
    except OSError as error:
        raise Wrong(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    except (ValueError, TypeError, ImportError, MemoryError) as error:
        raise Wrong(" ".join([str(error), *getattr(error, "__notes__", ())])) from error


def check_writable(out: Path, results: Sequence[str] = ()) -> None:
    """Raise OSError where the results could not be written later: in the folder, or in what it would be made in."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from error
    for name in results:
        if (out / name).exists() and not (out / name).is_file():
            raise OSError(errno.EEXIST, "not a regular file, and the results would go there", str(out / name))


def show(report: Report) -> None:
    """The table, what its columns mean, and what is known of the network."""
    with extras():
        from rich.console import Console

    from convexprune.report.blocks import MANY
    from convexprune.report.row import LEGEND

    console = Console()
    if console.is_terminal and len(report.rows) <= MANY:
        console.print(_table(report))
    else:
        click.echo(report.overview())
    for name, meaning in LEGEND:
        click.secho(f"  {name}: {meaning}", dim=True)
    click.echo()
    for line in report.summary():
        click.echo(line)


def _table(report: Report) -> Any:
    with extras():
        from rich import box
        from rich.table import Table

    from convexprune.report.row import HEADINGS, WORDS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in WORDS else "right", no_wrap=heading not in WORDS)
    for row in report.rows:
        table.add_row(*row.cells())
    return table
