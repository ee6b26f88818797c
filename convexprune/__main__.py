"""`python -m convexprune` is the command line."""

from convexprune.cli import main

if __name__ == "__main__":
    main(prog_name="python -m convexprune")
