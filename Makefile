# `make demo` and `make test` install what they need by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test unit servers versions demo compat chaos chaos-figures model lint docs pictures bench bench-peers bench-pilots bench-pilot-rate bench-pilot-rate-far bench-pilot-matching bench-dead-letters bench-cancel bench-count bench-size bench-idle vendor clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv with both distributions (editable) and all extras; PYTHON=python3.13 for another Python

# The venv is made anew when it is not complete, its Python is gone, or PYTHON names another one.
WHICH := 'import sys; print(sys.version, sys.base_prefix)'
WANTED := $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))
STALE := $(shell test -e $(STAMP) && there=$$($(BIN)/python -c $(WHICH)) && wanted=$$($(WANTED) -c $(WHICH)) \
	&& test "$$there" = "$$wanted" || echo stale)
.PHONY: stale

$(STAMP): diracx-tasks/pyproject.toml gubbins/pyproject.toml requirements-dev.txt constraints.txt $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@command -v git >/dev/null || { echo "git is needed: DiracX keeps its configuration in a git repository" >&2; exit 1; }
	$(if $(STALE),$(PYTHON) -m venv --clear $(VENV))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable 'diracx-tasks[dashboard,embedded,fast,migrations,testing]' --editable 'gubbins[testing]' --requirement requirements-dev.txt
	touch $@

# Without bytecode each of the processes would compile all tests anew.
test: $(STAMP) servers ## run all tests, in parallel; ARGS="-k locks" for some
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 6 --dist loadfile --no-loadscope-reorder $(ARGS)

unit: $(STAMP) ## run the unit tests alone, which need no servers
	$(BIN)/python -m pytest -n 2 diracx-tasks/tests/unit gubbins/tests/unit $(ARGS)

servers: ## install databases, batch systems, promtool and Chromium for the tests (Debian, as root); tests skip what is missing
	@$(PYTHON) tests/servers.py install

versions: $(STAMP) ## print the versions of the servers, batch systems and tools of the tests
	@$(BIN)/python tests/servers.py versions

demo: $(STAMP) ## run the whole pilot system on this machine; ARGS="--seconds 40 --json"
	@$(BIN)/python -m examples.demo $(ARGS)

lint: $(STAMP) ## ruff, layers (import-linter), private names in tests, words, mypy --strict; last, the size of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tests/private_names.py
	$(BIN)/python tests/vocabulary.py
	$(BIN)/mypy
	$(BIN)/python tests/lines_of_code.py

docs: $(STAMP) ## build the documentation into site/; a warning is an error
	$(BIN)/python docs/hooks/configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(STAMP) ## take the pictures of the dashboard in docs/images again (needs Chromium)
	$(BIN)/python tests/dashboard_pictures.py docs/images

compat: $(STAMP) ## test the migration from and to the published 0.7.0, with killed processes; run its tests against this package
	@$(BIN)/python -m benchmarks.compat $(ARGS)

chaos: $(STAMP) ## kill, pause and disconnect a real system under load, and check all guarantees; ARGS="--profile all --seconds 60", ARGS=--help
	@$(BIN)/python -m chaos $(ARGS)

chaos-figures: $(STAMP) ## chaos with every profile and 5 seeds (hours), written to benchmarks/RESULTS.md; ARGS=--help
	@$(BIN)/python -m chaos.figures $(ARGS)

model: $(STAMP) ## search every state of the delivery protocol for a broken guarantee; ARGS="--disturbances 2"
	$(BIN)/python -m model $(ARGS)

bench: $(STAMP) ## measure, and write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks $(ARGS)

bench-peers: $(STAMP) ## measure other task systems side by side with this one; ARGS="--peers ours,taskiq --rounds 1"
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-pilots: $(STAMP) ## 200 CEs, 10 VOs, 100,000 active pilots in simulated time; ARGS="--scale 0.1 --minutes 5"
	$(BIN)/python -m benchmarks.pilot_scale $(ARGS)

bench-pilot-matching: $(STAMP) ## pilots without work under each demand policy, over a simulated day; ARGS="--json"
	$(BIN)/python -m benchmarks.pilot_matching $(ARGS)

bench-pilot-rate: $(STAMP) ## pilots submitted per second, at near and distant sites; ARGS="--json"
	$(BIN)/python -m benchmarks.pilot_rate $(ARGS)

bench-pilot-rate-far: $(STAMP) ## the same at real sites with 200 ms of added latency
	$(BIN)/python -m benchmarks.pilot_rate_far

bench-dead-letters: $(STAMP) ## thousands of failures at once, with the database of dead letters available and unavailable
	$(BIN)/python -m benchmarks.dead_letters

bench-count: $(STAMP) ## count round trips, commands and bytes per task: the same on every machine
	@$(BIN)/python -m benchmarks.counts $(ARGS)

bench-idle: $(STAMP) ## server commands of idle workers, and the time until a task starts; ARGS="--workers 8 --dry-run"
	$(BIN)/python -m benchmarks.idle $(ARGS)

bench-cancel: $(STAMP) ## time for which a mass cancellation blocks the event loop of a worker; ARGS="--rounds 1 --dry-run"
	$(BIN)/python -m benchmarks.cancellations $(ARGS)

bench-size: $(STAMP) ## the slowest single call of the server with very large amounts of data; ARGS="--scale 0.01 --json"
	$(BIN)/python -m benchmarks.size $(ARGS)

# What the dashboard needs in a browser, as npm has it; the files are part of the package and of this repository, and
# SHA256SUMS beside them says what they have to be. For other versions, change both.
VENDORED := diracx-tasks/src/diracx/tasks/web/dashboard/static/vendor
vendor: ## fetch the dashboard's htmx and uPlot again, of the versions named here, and verify them (needs npm)
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && cd "$$work" \
		&& npm pack --silent htmx.org@2.0.11 uplot@1.6.32 >/dev/null \
		&& mkdir htmx uplot new && tar -xzf htmx.org-*.tgz -C htmx --strip-components=1 \
		&& tar -xzf uplot-*.tgz -C uplot --strip-components=1 \
		&& cp htmx/dist/htmx.min.js new/htmx.min.js \
		&& cp htmx/LICENSE new/htmx.LICENSE \
		&& cp uplot/dist/uPlot.iife.min.js new/uplot.min.js \
		&& cp uplot/dist/uPlot.min.css new/uplot.min.css \
		&& cp uplot/LICENSE new/uplot.LICENSE \
		&& cd new && sha256sum --strict --check "$(CURDIR)/$(VENDORED)/SHA256SUMS" \
		&& cp -- * "$(CURDIR)/$(VENDORED)/"

clean: ## remove everything that was made here
	rm -rf $(VENV) .venv-* site .bench .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
