# make demo   install into .venv and write a report from the bundled models and data
# make check  install the test extras, then lint, types, import directions and the quick tests: under 3 minutes
# make test   the whole suite; needs Chromium, npm and Slurm for some tests, which it installs as root
# make test-engines   serving engines, started for real: installs vLLM's CPU build into an environment of its own
PYTHON ?= python3
VENV := .venv
ENGINES := .venv-engines
VLLM := 0.32.0
BIN := $(VENV)/bin
# Tests of one file, and those that share started ranks or a browser, run one after the other in one worker.
WORKERS ?= 4
ALONE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Files with tests of times: importing all others takes longer than some of them.
TIMING = $(shell grep -rl --include='*.py' 'mark\.timing' tests)
PYTEST = $(ALONE) -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes; without bytecode each compiles the package again.
export PYTHONDONTWRITEBYTECODE :=
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo check test test-gpu test-engines lint system-packages axe clean

demo: $(VENV)/.capture
	$(BIN)/observatory quickstart --out demo

check: WORKERS = 3
check: lint
	$(PYTEST) -m "not gpu and not slow and not timing"

test: $(VENV)/.test system-packages axe
	$(PYTEST) --durations 25 -m "not gpu and not timing"
	$(ALONE) -m "timing and not gpu" $(TIMING)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu --junit-xml=gpu-figures.xml

test-engines: $(ENGINES)/.vllm
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest --durations 5 tests/engines

# --no-deps, as the wheel of vLLM asks for builds of torchvision, torchaudio and torchcodec that belong to another
# torch and break the import of models. The server asks for a distribution of the name vllm. Where PyPI's index
# has no torch of the name +cpu: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(ENGINES)/.packages: requirements-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	PIP_CONSTRAINT= $(ENGINES)/bin/python -m pip install -q --no-deps --no-compile -r requirements-engines.txt
	touch $@

$(ENGINES)/.vllm: $(ENGINES)/.packages pyproject.toml
	PIP_CONSTRAINT= $(ENGINES)/bin/python -m pip install -q --no-deps -e .
	place="$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
		mkdir -p "$$place/vllm-$(VLLM)+cpu.dist-info" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > "$$place/vllm-$(VLLM)+cpu.dist-info/METADATA"
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The browser tests need Chromium and, for accessibility, npm; those of srun a Slurm. Without root they skip
# and say so.
system-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		wanted=""; \
		command -v chromedriver >/dev/null || wanted="chromium chromium-driver fonts-dejavu"; \
		{ command -v slurmctld && command -v munged; } >/dev/null || wanted="$$wanted slurm-wlm munge libpmix-dev"; \
		command -v npm >/dev/null || wanted="$$wanted npm"; \
		test -z "$$wanted" || (apt-get update -q && \
			DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$wanted) >&2 || \
			echo "could not be installed, so their tests skip: $$wanted" >&2; \
	fi

# Checks accessibility in the browser tests (MPL-2.0, for tests alone); without npm they skip and say so.
axe: $(VENV)/.test
	@test -e $(VENV)/node_modules/axe-core || \
		npm install --prefix $(VENV) --no-save --no-package-lock --no-audit --no-fund axe-core@4.14.1 >&2 || \
		echo "axe-core could not be installed, so the tests of accessibility skip" >&2

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.capture: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[capture]"
	touch $@

# Layers of these frameworks are tested for real, each with what its layers need: --no-deps, because the rest of
# them wants a GPU or other versions. MegaBlocks has no wheel; its own setup needs the torch that is installed.
FRAMEWORKS := megatron-core nemo-automodel mixture-of-experts torchtitan,spmd-types litgpt,lightning-utilities \
	ai2-olmo-core,dataclass-extensions st-moe-pytorch,colt5-attention,beartype,einops
comma := ,
$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[test]"
	@$(foreach packages,$(FRAMEWORKS),$(BIN)/python -m pip install -q --no-deps --only-binary :all: \
		$(subst $(comma), ,$(packages)) || echo "no wheel for this Python, its tests skip: $(packages)" >&2;)
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation megablocks || \
		echo "could not be built, its tests skip: megablocks" >&2
	touch $@ $(VENV)/.capture

clean:
	rm -rf $(VENV) $(ENGINES) demo build dist *.egg-info
