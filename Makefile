# Everything runs in .venv, made on first use. pip's own settings (pip.conf, PIP_*) decide where packages come from.
PYTHON ?= python3
VENV ?= .venv
IPYKERNEL6 = .venv-ipykernel6
TENSORFLOW = .venv-tensorflow
MLFLOW = .venv-mlflow
MCP = .venv-mcp
BROWSER = .venv-browser
KILLS = 60
DISK_FULL = 20
SEED = 1

PY = $(VENV)/bin/python
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES = pyproject.toml constraints.txt

.DEFAULT_GOAL = help
.PHONY: help venv demo test check faults chaos papermill-suite test-ipykernel6 test-frameworks test-tensorflow test-mlflow test-mcp test-browser test-gpu recipes-full wheel-test bench clean
.DELETE_ON_ERROR:

help:  ## show this
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r goal text; do \
		printf '%-22s %s\n' "$$goal" "$$text"; done

venv: $(VENV)/.installed-dev  ## make .venv with everything for developing (PYTHON=python3.12 chooses another Python)

demo: $(VENV)/.installed-demo  ## explore, train, interrupt, resume, compare (about a minute after the install)
	@$(PY) demo/demo.py

test: $(VENV)/.installed-dev  ## all tests but the slow ones below
	$(PY) -m pytest -n 3 --dist worksteal -m 'not faults and not wheel and not gpu and not frameworks and not tensorflow and not mlflow and not mcp and not browser'

test-gpu: $(VENV)/.installed-dev  ## what needs a CUDA device, and a torch that can use it in .venv
	$(PY) -m pytest -m gpu

faults: $(VENV)/.installed-dev  ## the longer fault suite: real processes killed at chosen moments
	$(PY) -m pytest -n 4 --dist load -m faults

chaos: $(VENV)/.installed-dev  ## kill -9 at random moments: make chaos KILLS=1000 DISK_FULL=200 SEED=7
	$(PY) -m tests.chaos --kills $(KILLS) --disk-full $(DISK_FULL) --seed $(SEED)

papermill-suite: $(VENV)/.installed-dev  ## papermill's own test suite, with its engine and with grd, compared
	$(PY) tests/papermill_suite/run.py

test-ipykernel6: $(IPYKERNEL6)/.installed  ## magics, engine and signals with kernels of ipykernel 6.31, and no torch
	$(IPYKERNEL6)/bin/python -m pytest -n 2 --dist load tests/test_magics.py tests/test_engine.py \
		tests/test_agreement_magics.py tests/test_panel.py
	$(IPYKERNEL6)/bin/python -m pytest -n 2 --dist load tests/faults/test_fault_table.py \
		-k '(everyone or deadline) and (training or silent)'

test-frameworks: $(VENV)/.installed-frameworks  ## trainings with Lightning and with Hugging Face's Trainer
	$(PY) -m pytest -n 2 --dist load -m frameworks

test-tensorflow: $(TENSORFLOW)/.installed  ## what TensorFlow tells of the hardware, asked of the real package (its CPU build)
	$(TENSORFLOW)/bin/python -m pytest tests/test_tensorflow.py

test-mlflow: $(MLFLOW)/.installed  ## runs sent to a real MLflow: its sqlite store, and a server that is stopped
	$(MLFLOW)/bin/python -m pytest -n 2 --dist load -m mlflow tests/test_mlflow.py

test-mcp: $(MCP)/.installed  ## grd mcp with the SDK's own client, in memory and over stdio
	$(MCP)/bin/python -m pytest -n 2 --dist load -m mcp tests/test_mcp.py

test-browser: $(BROWSER)/.installed $(IPYKERNEL6)/.installed  ## the panel in a real JupyterLab and Chromium, with ipykernel 6.31 and 7
	$(BROWSER)/bin/python -m pytest -m browser tests/browser

recipes-full: $(VENV)/.installed-dev $(MCP)/.installed  ## the recipes for agents at full length: 90 s of training, calls of 20 s
	GRD_TEST_TRAINING_SECONDS=90 GRD_TEST_CALL_SECONDS=20 $(PY) -m pytest -n 2 --dist load tests/test_agents.py
	GRD_TEST_TRAINING_SECONDS=90 GRD_TEST_CALL_SECONDS=20 $(MCP)/bin/python -m pytest tests/test_mcp.py -k short_calls

wheel-test: $(VENV)/.installed-dev  ## build the wheel and use it in an empty venv
	$(PY) -m pytest -m wheel

bench: $(VENV)/.installed-dev  ## measure what grd costs; make bench BENCH=progress_overhead for one of them
	$(PY) -m benchmarks $(BENCH)

check: $(VENV)/.installed-dev  ## lint, format, types, layers
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

clean:  ## remove caches, build results and demo-output; .venv and experiments/ stay
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.made $(IPYKERNEL6)/.made $(TENSORFLOW)/.made $(MLFLOW)/.made $(MCP)/.made $(BROWSER)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "grd needs Python 3.11 or newer, and $(PYTHON) is" \
			"$$($(PYTHON) --version 2>/dev/null || echo not there); try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(@D) || { \
		rm -rf $(@D); echo "$(PYTHON) cannot make a venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.made $(SOURCES)
	@echo "Installing grd, torch and scikit-learn into $(VENV): some minutes the first time"
	@$(PIP_INSTALL) -e '.[demo]'
	@$(PY) -m compileall -q grd  # as in an installed package, also under PYTHONDONTWRITEBYTECODE
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(SOURCES)
	@echo "Installing grd, torch, scikit-learn and the development tools into $(VENV): some minutes the first time"
	@$(PIP_INSTALL) -e '.[demo,dev]'
	@$(PY) -m compileall -q grd
	@touch $(VENV)/.installed-demo $@

$(VENV)/.installed-frameworks: $(VENV)/.installed-dev
	@echo "Installing Lightning and transformers into $(VENV)"
	@$(PIP_INSTALL) -e '.[demo,dev,lightning,huggingface]'
	@touch $@

$(MLFLOW)/.installed: $(MLFLOW)/.made $(SOURCES)
	@echo "Installing grd and MLflow into $(MLFLOW)"
	@$(MLFLOW)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,mlflow]'
	@touch $@

$(MCP)/.installed: $(MCP)/.made $(SOURCES)
	@echo "Installing grd and the MCP SDK into $(MCP)"
	@$(MCP)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,mcp]'
	@touch $@

$(BROWSER)/.installed: $(BROWSER)/.made $(SOURCES)
	@echo "Installing grd, JupyterLab and playwright into $(BROWSER)"
	@$(BROWSER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,browser]'
	@touch $@

$(IPYKERNEL6)/.installed: $(IPYKERNEL6)/.made $(SOURCES)
	@echo "Installing grd with ipykernel 6.31 into $(IPYKERNEL6)"
	@$(IPYKERNEL6)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' ipykernel==6.31.0
	@touch $@

$(TENSORFLOW)/.installed: $(TENSORFLOW)/.made $(SOURCES)
	@echo "Installing grd and the CPU build of TensorFlow into $(TENSORFLOW): some minutes the first time"
	@$(TENSORFLOW)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' 'tensorflow-cpu>=2.16'
	@touch $@
