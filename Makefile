# make demo | figures | test | docs | fuzz | bench | sass | triton-full | gpu | wheels | lint | format | clean        PYTHON=python3.12 make ... picks another Python (3.10 or newer)
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
PINS := -c requirements/ci.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
CPP := $(shell find csrc tests/cpp tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# With and without a compiler are two different builds, so that installing one is noticed.
COMPILER := $(shell command -v $(firstword $(CXX)) || command -v c++ || command -v g++ || command -v clang++)
BUILT := $(VENV)/.built$(if $(COMPILER),,-without-compiler)

# The tools of the environment (ninja, pyright's node) are found first, by setup.py too.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONPATH

.PHONY: demo figures test docs fuzz bench sass triton-full gpu wheels lint format clean help
help:
	@sed -n 1p Makefile

demo: $(BUILT)
	$(VENV)/bin/python examples/digits/train.py

# Tables and figures of the papers at the small size, docs/papers.md; what was interrupted goes on where it was.
FIGURES := table1 table2 fig1_fig6 fig2 fig3 fig4_fig5 weight_norm finetune
figures: $(BUILT)
	for script in $(FIGURES); do $(VENV)/bin/python examples/paper/$$script.py || exit 1; done

# For every GPU, but not compiled for each: `make sass` and the wheels take all that setup.py names.
test: export TORCH_CUDA_ARCH_LIST ?= 7.5+PTX;9.0;12.0+PTX
test: $(BUILT) $(VENV)/.tools
	$(VENV)/bin/python tests/run_lanes.py

docs: $(BUILT) $(VENV)/.docs
	$(VENV)/bin/sphinx-build -E -W --keep-going -q docs build/docs

# make fuzz N=20000 [SEED=...]: as many lives of optimizers, from another seed each time unless it is given.
N := 2000
SEED := $(shell od -An -N3 -tu4 /dev/urandom)
fuzz: $(BUILT) $(VENV)/.tools
	FUZZ_CASES=$(N) FUZZ_SEED=$(strip $(SEED)) $(VENV)/bin/pytest -q -n 2 -m fuzz -k lives tests/test_fuzz.py

# Ours against what is in requirements/peers.txt, in an environment of its own.
PEERS := build/peers
bench: $(PEERS)/.built
	$(PEERS)/bin/python -m pytest $(if $(findstring bench/,$(BENCH)),,bench) -q --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname $(BENCH)

sass: $(BUILT) $(VENV)/.tools
	$(VENV)/bin/python tests/sass.py --write docs/sass.md
	$(VENV)/bin/python tests/triton_code.py --write docs/triton.md

# All targets, and the interpreter, with the oldest Triton that is supported and with the pinned one.
OLD_TRITON := 3.6.0
OLD_TRITON_AT := $(CURDIR)/build/triton-$(OLD_TRITON)
triton-full: $(BUILT) $(VENV)/.tools
	test -d $(OLD_TRITON_AT) || $(PIP) install --no-deps --target $(OLD_TRITON_AT) triton==$(OLD_TRITON)
	rm -f docs/triton-full.log
	failed=0; for at in $(OLD_TRITON_AT) ''; do \
		PYTHONPATH=$$at $(VENV)/bin/python tests/triton_code.py --log docs/triton-full.log || failed=1; \
		said=$$(PYTHONPATH=$$at TRITON_INTERPRET=1 $(VENV)/bin/pytest -q -n 2 tests/test_interpreted.py) || failed=1; \
		echo "  pytest tests/test_interpreted.py: $$(echo "$$said" | tail -n 1)" >> docs/triton-full.log; \
	done; exit $$failed

# On a machine with a GPU and no network: nothing is installed, so this Python has to have torch. See bench/README.md.
gpu:
	@test -n "$(OUT)" || { echo 'make gpu OUT=folder [PART="build tests ..."] [MINUTES=9] [DONE=records] [REHEARSE=1]'; exit 1; }
	$(PYTHON) bench/gpu_parts.py --out "$(OUT)" $(if $(PART),--part $(PART)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(DONE),--done $(DONE)) $(if $(REHEARSE),--rehearse)

# sdist and wheels in dist/, tried in empty environments: make wheels [CUDA=1] [PYTHONS="3.11 3.12"] [TORCHES="2.10.0 2.13.0"]
# [LOG=docs/wheels.log]. Needs the package index, and every Python of PYTHONS on the PATH or in pyenv.
wheels: $(VENV)/.torch
	$(PIP) install $(PINS) build
	$(VENV)/bin/python tests/wheels.py $(if $(filter 1,$(CUDA)),--cuda) $(if $(PYTHONS),--pythons $(PYTHONS)) \
		$(if $(TORCHES),--torches $(TORCHES)) $(if $(LOG),--log $(LOG))

lint: $(BUILT) $(VENV)/.tools
	$(VENV)/bin/python tests/run_lanes.py lint

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info fastwrs/_C*.so .hypothesis .ruff_cache examples/digits/out examples/frameworks/out examples/paper/out/digits
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Stamps: what a build needs (pinned torch first), the built package with what the demo needs, the tools of tests and pages.
$(VENV)/.torch: requirements/ci.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastwrs needs Python 3.10 or newer: PYTHON=python3.x make ..."; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment (on Debian: apt-get install python3-venv)"; exit 1; }
	@echo "installing torch (the first time only) ..."
	$(PIP) install $(PINS) torch 'setuptools>=77' ninja
	@touch $@

$(BUILT): $(VENV)/.torch $(SOURCES)
	@echo "building fastwrs ..."
	$(PIP) install --no-build-isolation $(PINS) -e '.[examples]'
	@touch $@

$(PEERS)/.built: $(BUILT) requirements/ci.txt requirements/peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "installing what ours is measured against ..."
	$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install $(PINS) torch 'setuptools>=77' ninja
	$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation $(PINS) \
		-r requirements/peers.txt -e '.[examples,test]'
	@touch $@

$(VENV)/.docs: requirements/ci.txt pyproject.toml | $(BUILT)
	$(PIP) install --no-build-isolation $(PINS) -e '.[examples,docs]'
	@touch $@

$(VENV)/.tools: requirements/ci.txt pyproject.toml | $(BUILT)
	@echo "installing the tools for tests ..."
	$(PIP) install --no-build-isolation $(PINS) -e '.[examples,test,lint]'
	@touch $@
