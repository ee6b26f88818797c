"""The command line."""

from convexprune.extras import extras

try:
    with extras():
        import click
except ImportError as error:
    raise SystemExit(f"the command line: {error}") from error

from convexprune.command.compact import compact
from convexprune.command.demo import demo
from convexprune.command.evaluate import evaluate
from convexprune.command.merge import merge
from convexprune.command.prune import prune
from convexprune.command.report import report
from convexprune.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="convexprune")
def main() -> None:
    """Prune trained networks by convex optimisation, with certificates."""


for command in (prune, compact, merge, evaluate, report, demo):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="convexprune")
