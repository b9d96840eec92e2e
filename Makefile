# make demo and make test set everything up on a fresh machine; make setup does nothing when .venv is current.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.current

# Modules are compiled once, and not by every process that imports them, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-full check bench site pictures release prefect mlflow format clean

setup: $(STAMP)

# torch first and alone: its CPU build is small, the one other packages would pull in is several gigabytes of CUDA.
# Then the exact set as it is written down, for resolving it again takes a minute; last what it may lack.
# Modules are compiled when they are imported: of most packages few are.
PIP := $(BIN)/pip install --quiet --no-compile
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 || $(PIP) torch==2.13.0
	$(PIP) --no-deps -r constraints.txt
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/wsiflow run name=demo out=demo/run

# More processes than two cores: schedulers, servers and browsers are waited for half of the time.
PYTEST := $(BIN)/python -m pytest -q -n 6 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# Every sweep in full size: hours.
test-full: setup
	WSIFLOW_CRASH_STRIDE=1 WSIFLOW_KILLS=50 WSIFLOW_COVERAGE_SETS=1000 WSIFLOW_FOREST_ALL=1 WSIFLOW_ZOO_ALL=1 WSIFLOW_ARRAY_SLIDES=6 $(PYTEST) --timeout 20000

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/codespell

# Every screenshot of docs/, from the real programs: the pictures of wsiflow's own pages, of Prefect's and of MLflow's.
pictures: setup
	WSIFLOW_DOCS_PICTURES=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/test_site.py tests/flows/test_view.py \
	  tests/flows/test_browser.py tests/flows/test_deployments.py

# The pages of docs/ as a static site, in site/; DOCS=serve shows it while it is written.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(DOCS),build --strict)

# The sdist, the wheel, the list of components and the hashes, in dist/; installed and run on every Python found here.
release:
	.ci/release

# About an hour on an idle machine; DATA, GOOGLENET, SLIDE and BEFORE name what is not part of this repository.
bench: setup
	$(BIN)/python -m benchmarks $(if $(DATA),--data $(DATA)) $(if $(GOOGLENET),--googlenet $(GOOGLENET)) \
	  $(if $(SLIDE),--slide $(SLIDE)) $(if $(BEFORE),--before $(BEFORE))

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A lasting Prefect server on this machine only; then: export PREFECT_API_URL=http://127.0.0.1:4200/api
prefect: setup
	DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false $(BIN)/prefect server start --host 127.0.0.1

# The runs that were recorded in this folder, in the browser.
mlflow: setup
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --workers 1 --backend-store-uri sqlite:///runs/mlflow.db

clean:
	rm -rf .venv build dist site *.egg-info demo runs
