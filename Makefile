# Each target makes the .venv that it needs, from the exact versions of constraints.txt. ARGS goes to the command:
#   make demo ARGS="--data mnist.npz --weights lenet300.npz"      make test ARGS="-k cvxpy"      make test ARGS="--cov=convexprune"
PYTHON ?= python3
BIN := .venv/bin

EXTRAS_demo := report
EXTRAS_dev := cvxpy,report,dev
EXTRAS_docs := cvxpy,report,docs
EXTRAS_bench := cvxpy,report,bench
EXTRAS_papers := cvxpy,report

# a look at every room in under 30 seconds; `make test` runs all files
QUICK := activation calibration capture coverage imports layer patterns predict printing report solve traversal \
         whole_file write_back

.PHONY: demo test test-quick fuzz scales lint docs bench papers clean

demo: .venv/demo.stamp
	$(BIN)/convexprune demo $(ARGS)

test: .venv/dev.stamp
	$(BIN)/pytest $(ARGS)

test-quick: .venv/dev.stamp
	$(BIN)/pytest $(QUICK:%=tests/test_%.py) $(ARGS)

fuzz: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

scales: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/scales.py $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs.stamp
	$(BIN)/sphinx-build --fail-on-warning --quiet -b html docs docs/_build/html

bench: .venv/bench.stamp
	$(BIN)/benchopt run benchmarks/nettrim --config benchmarks/nettrim/small.yml --no-display $(ARGS)
	$(BIN)/benchopt run benchmarks/reconstruction --config benchmarks/reconstruction/small.yml --no-display $(ARGS)
	$(BIN)/benchopt run benchmarks/allocation --config benchmarks/allocation/small.yml --no-display $(ARGS)
	$(BIN)/python benchmarks/gpu.py --small

# the tables of docs/papers.md; DATA is the folder with mnist.npz, cifar10.npz, lenet300.npz and resnet20.npz
papers: export CONVEXPRUNE_DATA := $(or $(DATA),$(CONVEXPRUNE_DATA))
papers: export PYTHONPATH := benchmarks
papers: export OMP_NUM_THREADS := 1
papers: .venv/papers.stamp
	for paper in net_trim lobs joint_allocation merging; do $(BIN)/python -m papers.$$paper $(ARGS) || exit 1; done

clean:
	rm -rf .venv docs/_build docs/auto_gallery

.venv/%.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS_$*)]"
	touch $@
