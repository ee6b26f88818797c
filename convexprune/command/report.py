"""`convexprune report` shows what a pruning has left in its folder."""

from __future__ import annotations

from pathlib import Path

import click

from convexprune.command.show import reported, show


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Show the report of a pruned model: FOLDER/report.json, or the file itself."""
    from convexprune.report import Report

    with reported():
        place = folder / "report.json" if folder.is_dir() else folder
        show(Report.from_json(place.read_text(encoding="utf-8")))
