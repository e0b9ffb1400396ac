# make train    set up what is missing, then train with the fused operator
# make test     set up what is missing, then run the tests, in two processes
# make test-all the long tests too: whole tile tables, sanitizers, the kill storm
#
# Setting up is a virtual environment pinned by constraints.txt and the native module, built in place;
# both are done again only when what they are made from changes. CUDA's sources, which take minutes,
# are compiled where there is a GPU; SOFTCL_CUDA=1 compiles them anywhere, SOFTCL_CUDA=0 nowhere.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# Processes among which the test files are shared out; PROCESSES=0 is one, with a debugger (--pdb).
PROCESSES ?= 2

python := $(VENV)/bin/python
key = $(shell cat $(1) 2>/dev/null | cksum | tr -d ' ')

# Stamps carry a checksum of what they were made from: a change asks for another stamp. Times play
# no part, for git sets them anew.
environment := $(VENV)/.softcl-$(call key,constraints.txt pyproject.toml)
sources     := setup.py CMakeLists.txt $(sort $(shell find csrc -type f))
ifeq ($(SOFTCL_CUDA),)
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep GPU),)
export SOFTCL_CUDA := 0
left_out := softcl: no GPU here, so CUDA is left out: SOFTCL_CUDA=1 make build compiles it too
endif
endif
switches    := $(SOFTCL_BUILD) $(SOFTCL_CUDA) $(abspath $(environment))
native      := build/.native-$(call key,$(sources))-$(shell echo '$(switches)' | cksum | tr -d ' ')

.PHONY: train test test-all build setup lint format clean help

train: build  ## train: softcl.train --fused on the default set; ARGS="--epochs 1" adds flags
	$(python) -m softcl.train --fused $(ARGS)

# A thread for each process: what depends on threads sets their number itself; those that wait do so
# asleep, since another process has the core. Files start in the order of tests/conftest.py, and each
# stays in one process.
test test-all: build  ## run the tests; ARGS="-k queue" adds pytest flags
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(python) -m pytest tests -q -n $(PROCESSES) \
	  --dist loadfile --no-loadscope-reorder $(if $(filter test-all,$@),--long) $(ARGS)

build: $(native)  ## build the native module softcl/_C; SOFTCL_CUDA=1 with CUDA

setup: $(environment)  ## make the virtual environment

lint: $(environment)  ## check style: ruff and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc bench/native tests/native -type f | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(environment)  ## rewrite the sources in that style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	find csrc bench/native tests/native -type f | xargs $(VENV)/bin/clang-format -i

clean:  ## remove what was built, not the environment
	rm -rf build dist softcl.egg-info softcl/_C.*

help:  ## this list
	@grep -E '^[a-z -]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 16

# ---- Environment ----------------------------------------------------------------------------------

# All the extras but the loggers, which bring servers along, and umap, which brings a compiler; without
# softcl itself: commands run from this folder import it from here.
define list_requirements
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: the copy that pip carries
    from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
left_out = ("wandb", "mlflow", "umap")
extras = (v for k, v in project["optional-dependencies"].items() if k not in left_out)
print(*project["dependencies"], *(line for extra in extras for line in extra), sep="\n")
endef
export list_requirements

define check_version
import sys
if sys.version_info < (3, 10):
    sys.exit("softcl needs Python 3.10 or newer, and $(PYTHON) is %d.%d: "
             "try make PYTHON=python3.11" % sys.version_info[:2])
endef
export check_version

# Off a terminal nothing shows that a long command is alive: a line every half minute does.
tell_on = test -t 1 || { while sleep 30 >/dev/null 2>&1; do echo 'softcl: $(1) ...'; done & \
	  trap "kill $$! 2>/dev/null" EXIT; };

$(environment):
	@$(PYTHON) -c "$$check_version"
	@if [ ! -d '$(VENV)' ]; then \
	  echo "softcl: setting up $(VENV): several GB and some minutes, once"; fi
	@$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv '$(VENV)'
	@$(python) -c "$$list_requirements" > '$(VENV)/requirements.txt'
	@$(call tell_on,installing packages into $(VENV)) \
	$(python) -m pip install --disable-pip-version-check --prefer-binary $$(test -t 1 || echo -q) \
	  -r '$(VENV)/requirements.txt' -c constraints.txt
	@rm -f '$(VENV)'/.softcl-* && touch '$@'

# ---- Native module --------------------------------------------------------------------------------

# The module itself is asked for too: someone may have removed it.
ifeq ($(wildcard softcl/_C.*),)
.PHONY: $(native)
endif

$(native): | $(environment)
	@$(call tell_on,compiling the native module) $(python) setup.py build_ext --inplace
	@$(if $(left_out),echo '$(left_out)')
	@mkdir -p build && rm -f build/.native-* && touch '$@'
