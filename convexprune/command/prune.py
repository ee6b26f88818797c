"""`convexprune prune` makes of a model's folder the folder of the pruned model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from convexprune.command.folder import CONFIG
from convexprune.command.samples import Windows, moved
from convexprune.command.show import check_writable, reported, show
from convexprune.command.source import SAMPLES, Source, check_device, options
from convexprune.extras import extras
from convexprune.network import Calibration, save
from convexprune.network.coverage import coverage
from convexprune.network.files import serialised
from convexprune.network.memory import available, highest, resident
from convexprune.network.names import REGEX, choose, stacks
from convexprune.options import number, optional
from convexprune.pruning.backends import Backend, InProcess, Joblib
from convexprune.pruning.execution import Execution
from convexprune.pruning.plan import Plan
from convexprune.pruning.recipe import SOLVERS, Recipe, Rule
from convexprune.report.progress import drawn
from convexprune.whole_file import write_whole

if TYPE_CHECKING:
    from torch import nn

    from convexprune.report import Report
    from convexprune.report.progress import Progress

PAGE, NUMBERS, RECIPE, MASKS, WORK = "report.html", "report.json", "recipe.toml", "masks.safetensors", "unfinished"
RESULTS: Final = (PAGE, NUMBERS, RECIPE, MASKS)
AUTO: Final = "auto"
HEAD: Final = 0.1  # of the free memory that judging the head may take
WEIGHTS: Final = "pruned.safetensors"  # of a model that is no folder


@dataclass(frozen=True)
class Short:
    """A recipe in a few options."""

    sparsity: float | None
    pattern: str
    epsilon: float | None
    solver: str | None
    damping: float
    only: tuple[str, ...]
    ignore: tuple[str, ...]

    def recipe(self, allocated: bool) -> Recipe:
        """The rules: those ignored stay dense, and the others get one problem."""
        fixed = ":" in self.pattern or allocated
        if self.epsilon is None and self.sparsity is None and not fixed:
            raise ValueError("say what is wanted: --sparsity 0.5, --pattern 2:4, --epsilon 0.05 or --recipe FILE")
        dense = [Rule(name, problem="dense") for name in self.ignore]
        kind = "reconstruction" if self.epsilon is None else "net-trim"
        wanted = [
            Rule(
                name, kind, None if allocated else self.sparsity, self.pattern, self.epsilon, self.damping, self.solver
            )
            for name in self.only or ("*",)
        ]
        return Recipe([*dense, *wanted])


@click.command()
@click.argument("model")
@click.option("--calibration", required=True, help=f"{SAMPLES}.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the pruned model; made if missing."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="A TOML file of rules, instead of the options below.")
@click.option("--sparsity", type=float, help="Share of the weights that goes.")
@click.option("--pattern", default="unstructured", show_default=True, help="unstructured, per-row, channels, 2:4, 4x4.")
@click.option("--epsilon", type=float, help="Net-Trim instead: how far a layer's outputs may move.")
@click.option("--solver", type=click.Choice([AUTO, *sorted(SOLVERS)]), help="Default: balanced; of Net-Trim its own.")
@click.option("--time", type=float, help="Seconds: --solver auto is the best preset that is planned to take no more.")
@click.option("--damping", type=float, default=0.0, show_default=True, help="Of the Gram matrices.")
@click.option("--only", multiple=True, help="Layers that are pruned, by a glob; several times for several.")
@click.option("--ignore", multiple=True, help="Layers that stay dense, by a glob.")
@click.option("--allocate", is_flag=True, help="Divide the budget among the layers instead of pruning each alike.")
@click.option(
    "--distill", type=click.IntRange(min=0), default=0, help="Epochs of training on the dense outputs afterwards."
)
@click.option(
    "--mode", type=click.Choice(["parallel", "cascade", "residual"]), default="cascade", show_default=True,
    help="What a layer reads and aims at.",
)  # fmt: skip
@click.option("--class", "kind", help="Class of transformers to load it as; default: the config's.")
@click.option("--weights", type=click.Path(path_type=Path), help="File of cp.save for a model of module:function.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer; default: MODEL.")
@options
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where the model runs, its activations are summed and solvers work; the judge is on the CPU.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Layers solved at once.")
@click.option("--dask", help="Address of a dask scheduler whose workers solve the layers.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder for activations; default: in memory.")
@click.option("--memory", type=float, help="Gigabytes that may be used; a plan above it is refused.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with what OUT has of this run.")
@click.option("--dry-run", is_flag=True, help="Say what would be pruned and what it takes, and stop.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def prune(
    model: str, calibration: str, out: Path, recipe: Path | None, sparsity: float | None, pattern: str,
    epsilon: float | None, solver: str | None, time: float | None, damping: float, only: tuple[str, ...],
    ignore: tuple[str, ...],
    allocate: bool, distill: int, mode: str, kind: str | None, weights: Path | None, tokenizer: Path | None,
    windows: int, first: int, length: int, batch: int, device: str, jobs: int, dask: str | None, scratch: Path | None,
    memory: float | None, resume: bool, dry_run: bool, seed: int,
) -> None:  # fmt: skip
    """Prune MODEL, a transformers folder or module:function, layer by layer, and write the pruned model to OUT.

    The same command goes on where it was stopped.
    """
    with reported():
        _check_time(solver, time, epsilon is None and recipe is None)
        short = Short(sparsity, pattern, epsilon, None if solver == AUTO else solver, damping, only, ignore)
        rules = short.recipe(allocate) if recipe is None else _recipe(recipe, short)
        if allocate and sparsity is None:
            raise ValueError("--allocate divides a budget: give --sparsity, the share of the weights that goes in all")
        if allocate:
            rules.check_allocated()
        check_device(device)
        optional(number(0))("--memory", memory)
        if scratch is not None:
            check_writable(scratch)
        place = Place(out)
        place.check()
        source = Source(model, kind, weights, tokenizer)
        if weights is not None and source.folder is not None:
            raise ValueError(f"--weights is for a model of a function; {model} has weights of its own")
        before = source.ready()
        dense = source.skeleton() if dry_run and source.folder is not None else source.model()
        loaded = resident()
        batches = source.samples(calibration, dense, Windows(windows, first, length, batch))
        here = resident()
        budget = 1 - sparsity if allocate and sparsity is not None else None
        needs = (before + here - loaded, max(0, highest() - here), source.shard)
        job = Job(dense, batches, rules, mode, budget, seed, device, *needs)
        if time is not None:
            short = replace(short, solver=job.plan.within(time))
            rules = short.recipe(allocate)
            job = replace(job, recipe=rules)
            click.echo(f"--solver {short.solver}: the best preset that is planned to take no more than {time:g} s")
        click.echo(job.text())
        job.plan.check(memory)
        if dry_run:
            return
        with drawn() as progress, _backend(jobs, dask) as backend:
            execution = Execution(scratch=scratch, backend=backend, store=place.work(resume))
            pruned, report = job.run(execution, progress)
            pruned, report = job.distilled(pruned, report, distill) if distill else (pruned, report)
        show(report)
        place.finish(source, pruned, report, rules)


def _check_time(solver: str | None, time: float | None, plain: bool) -> None:
    """Raise ValueError where the time and the solver do not go together; plain: without --epsilon and --recipe."""
    if (time is None) != (solver != AUTO):
        raise ValueError("--solver auto and --time SECONDS go together: the best preset that fits is taken")
    if time is not None and not plain:
        raise ValueError("--time chooses a preset for the options here; a recipe, and --epsilon, say their solvers")
    if time is not None and not time > 0:
        raise ValueError(f"--time is {time:g}; give seconds > 0")


def _recipe(path: Path, short: Short) -> Recipe:
    """Of a file, which says all that the short options say."""
    if short != Short(None, "unstructured", None, None, 0.0, (), ()):
        raise ValueError("--recipe says it all; leave --sparsity, --pattern, --epsilon, --solver, --only, ... out")
    return Recipe.from_toml(path.read_text(encoding="utf-8"), str(path))


@contextmanager
def _backend(jobs: int, dask: str | None) -> Iterator[Backend]:
    if dask is None:
        yield Joblib(jobs) if jobs > 1 else InProcess()
        return
    with extras():
        from distributed import Client
    with Client(dask, timeout="10s") as client:  # type: ignore[no-untyped-call]
        yield Joblib(max(jobs, sum(client.nthreads().values())), engine="dask")


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be pruned, how, and on what.

    budget  the share of the weights that an allocation may keep; None: each rule says its own
    """

    dense: nn.Module
    batches: Iterable[Any]
    recipe: Recipe
    mode: str
    budget: float | None
    seed: int
    device: str
    process: int  # bytes that this process has besides the model
    reading: int  # bytes that it had for a moment beyond those
    shard: int  # bytes of the largest file of the model's weights

    @cached_property
    def layers(self) -> list[str]:
        """The layers that the recipe prunes; raises ValueError for a rule that matches none."""
        known = stacks(self.dense)
        named = {rule.layers for rule in self.recipe.rules} & set(known)
        names = list(dict.fromkeys([*(module for module, _ in choose(self.dense, None).pairs), *sorted(named)]))
        self.recipe.check_matches(names)
        found = {name: self.recipe.rule(name) for name in names}
        chosen = [name for name, rule in found.items() if rule is not None and rule.problem != "dense"]
        if not chosen:
            raise ValueError("the recipe leaves every layer dense; there is nothing to prune")
        return chosen

    @cached_property
    def calibration(self) -> Calibration:
        """The samples, where the model runs, for the layers that are pruned, and the head that is judged."""
        alone = [*self._head, *(set(self.layers) & {rule.layers for rule in self.recipe.rules})]
        others = [re.escape(name) for name in self.layers if name not in alone]
        # one request: of what it names some may never be called
        names = [*alone, *([f"{REGEX}{'|'.join(others)}"] if others else [])]
        return Calibration([moved(batch, self.device) for batch in self.batches], names=names, seed=self.seed)

    @cached_property
    def _head(self) -> list[str]:
        """The language model's head: judged as it is, a cascade's guarantee ends in the outputs; if that fits."""
        head = getattr(self.dense, "get_output_embeddings", lambda: None)()
        names = [name for name, module in self.dense.named_modules() if module is head and name in stacks(self.dense)]
        there = available()
        fits = there is None or all(24 * stacks(self.dense)[name].weight.numel() < HEAD * there for name in names)
        return names if self.mode != "parallel" and self.budget is None and fits else []

    @cached_property
    def plan(self) -> Plan:
        """What it takes, from shapes alone."""
        needs = (self.process, self.reading, self._judged, self.shard)
        return Plan.of(self.dense, self.calibration, self._all_rules, self.mode, *needs)

    @cached_property
    def _judged(self) -> list[str]:
        """The head, where it is not pruned."""
        return [name for name in self._head if name not in self.layers]

    @cached_property
    def _all_rules(self) -> Recipe:
        """The recipe, in which what is judged stays dense."""
        return Recipe([*(Rule(name, problem="dense") for name in self._judged), *self.recipe.rules])

    def text(self) -> str:
        """What is pruned and what that takes, and what stays as it is and why."""
        judged = [f"stays as it is, and its error is measured: {name}" for name in self._judged]
        return "\n".join([self.plan.text(), *judged, *coverage(self.dense, self.layers, self.layers).lines()])

    def run(self, execution: Execution, progress: Callable[[Progress], None] | None) -> tuple[nn.Module, Report]:
        """Prune."""
        from convexprune.allocate import Allocation
        from convexprune.allocate.rate_distortion import SecondOrder
        from convexprune.prune import prune as pruned

        allocation = None if self.budget is None else Allocation(self.budget, SecondOrder())
        recipe = self._all_rules if self.device == "cpu" else self._all_rules.on(self.device)
        return pruned(
            self.dense.to(self.device), self.calibration, recipe, mode=self.mode, allocation=allocation,
            progress=progress, execution=execution,
        )  # fmt: skip

    def distilled(self, pruned: nn.Module, report: Report, epochs: int) -> tuple[nn.Module, Report]:
        """The pruned model after some training on the dense one's outputs, and the report that says so."""
        from convexprune.distill import distill

        trained, found = distill(self.dense, pruned, self.calibration, epochs=epochs, seed=self.seed)
        if found.note:
            said = f"--distill left the weights as they were: {found.note}"
        else:
            said = (
                "afterwards the weights that were kept were trained on the dense outputs, which this report is not "
                f"about ({found})"
            )
        return trained, replace(report, afterwards=said)


@dataclass(frozen=True)
class Place:
    """The folder that the pruned model goes to, with the folder of what is unfinished in it."""

    out: Path

    def check(self) -> None:
        """Raise OSError or ValueError where nothing can be written there, or something else is there."""
        check_writable(self.out, (*RESULTS, WEIGHTS))
        if (self.out / CONFIG).exists() and not (self.out / WORK).exists() and not (self.out / NUMBERS).exists():
            raise ValueError(f"{self.out} holds a model that this command has not made; give another folder")

    def work(self, resume: bool) -> Path:
        """The folder of what is finished so far; emptied where it is not wanted."""
        folder = self.out / WORK
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, source: Source, pruned: nn.Module, report: Report, recipe: Recipe) -> None:
        """Write the model, the report, the recipe and the masks; what was unfinished goes."""
        pruned = pruned.to("cpu")
        if source.folder is not None:
            source.folder.save(pruned, self.out)
        else:
            save(pruned, self.out / WEIGHTS, {"report": NUMBERS, "kept": f"{report.kept_fraction:.6f}"})
        report.save_html(self.out / PAGE)
        report.save_json(self.out / NUMBERS)
        write_whole(self.out / RECIPE, recipe.to_toml())
        write_whole(self.out / MASKS, packed_masks(pruned, [row.module for row in report.rows]))
        for name in ("layers",):
            shutil.rmtree(self.out / WORK / name, ignore_errors=True)
        shutil.rmtree(self.out / WORK, ignore_errors=True)
        click.echo(f"written: {self.out}: the model, {', '.join(RESULTS)}")


def packed_masks(model: nn.Module, modules: Iterable[str]) -> bytes:
    """Which weights are not zero, as safetensors: eight to a byte, shapes in the metadata."""
    import numpy as np
    import torch

    known = stacks(model)
    packed, shapes = {}, {}
    for module in dict.fromkeys(modules):
        weight = known[module].weight.detach()
        name = f"{module}.{known[module].weight_name}"
        packed[name] = torch.from_numpy(np.packbits((weight != 0).cpu().numpy().reshape(-1)))
        shapes[name] = list(weight.shape)
    return serialised(packed, {"shapes": json.dumps(shapes), "packed": "numpy.packbits, row by row"})
