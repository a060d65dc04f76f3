# bridged: what a developer and CI run, the same lines on a laptop, a Raspberry Pi and a fresh machine.
# Needs: python3 (3.11 or newer) with venv, make. No compiler. `make` alone lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= config/bridged.toml
PREFIX ?= /opt/bridged
FUZZ_SECONDS ?= 60
SOAK_MINUTES ?= 120
# Of vm-reliability and soak: power cuts, and how long an idle gateway is watched.
CUTS         ?= 50
IDLE_S       ?= 3600
# Most tests wait for a wire in real time, so that more of them than there are cores go side by side.
TEST_JOBS    ?= $(shell echo $$(( $$(nproc) + 2 )))

# These need no virtual machine, only its root, and go beside it.
CONTAINER_TESTS := tests/vm/test_service.py tests/vm/test_package.py

# Two sets of locked packages, so that who only wants to try it does not install compilers and test tools.
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
PIP       := $(BIN)/python -m pip install -qq --disable-pip-version-check
LOCK      := $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
             --no-header --no-emit-index-url --no-emit-find-links

.DEFAULT_GOAL := help
.PHONY: shell vm-test vm-guest vm-reliability deb release reliability help venv demo test check format lock reference fuzz soak bench firmware firmware-check stub stub-check run sim install clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(RUN_STAMP) ## flash three simulated boards through nc, and prove it (about a minute)
	@$(BIN)/bridged demo

test: $(DEV_STAMP) ## run every test; what is missing on this machine is listed with its remedy
	@failed=0; \
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile -m 'not alone' || failed=$$?; \
	echo 'and those that want the machine for themselves:'; \
	$(BIN)/python -m pytest -m alone || failed=$$?; \
	exit $$failed

vm-test: vm-guest ## a real gateway in a virtual machine: systemd, GPIO chip, serial ports, power cuts (as root, Debian 12)
	@export BRIDGED_DEB="$$(cat .cache/vm/package 2>/dev/null)"; failed=0; \
	none() { [ $$1 = 5 ] && [ -n '$(ARGS)' ]; }; \
	$(BIN)/python -m pytest $(CONTAINER_TESTS) $(ARGS) >.cache/vm/containers.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest tests/vm $(CONTAINER_TESTS:%=--ignore=%) $(ARGS) || none $$? || failed=1; \
	wait $$beside || none $$? || failed=1; \
	echo 'and those in containers, which ran beside it:'; cat .cache/vm/containers.log; \
	exit $$failed

# What both halves of it need, once: the guest (from Debian, a minute) and the package of this checkout.
vm-guest: $(DEV_STAMP)
	@mkdir -p .cache/vm
	@if reason=$$($(BIN)/python -m tests.vm.build 2>&1 >/dev/null); then $(MAKE) -s .cache/vm/package; \
	else rm -f .cache/vm/package; echo "no virtual machine: $$reason"; fi

.cache/vm/package: $(DEV_STAMP) requirements.lock pyproject.toml CHANGELOG.md \
                   $(shell find bridged config debian docs shell systemd -type f ! -name '*.pyc')
	@$(BIN)/python debian/build.py --out .cache/vm > $@.new && mv $@.new $@

vm-reliability: ## fifty power cuts, kills, removals, an idle gateway; written to docs/reliability-vm.md
	rm -f .cache/vm/record
	@failed=0; \
	BRIDGED_VM_RECORD=$(CURDIR)/.cache/vm/record BRIDGED_CUTS=$(CUTS) BRIDGED_IDLE_S=$(IDLE_S) $(MAKE) vm-test ARGS='--timeout 0' || failed=1; \
	$(BIN)/python -m tests.vm.page .cache/vm/record; \
	exit $$failed

check: $(DEV_STAMP) ## format, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(DEV_STAMP) ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

venv: $(DEV_STAMP) ## set up .venv with everything for development

run: $(RUN_STAMP) ## the daemon in the foreground: make run CONFIG=my.toml
	$(BIN)/bridged serve --config $(CONFIG) --state-dir .cache/state

sim: $(RUN_STAMP) ## one simulated target on a pty: make sim ARGS="--chip F756"
	$(BIN)/bridged sim $(ARGS)

reference: $(RUN_STAMP) ## write config/bridged.toml anew from the code
	$(BIN)/python -c 'from bridged.config.reference import reference; print(reference(), end="")' > config/bridged.toml.new
	mv config/bridged.toml.new config/bridged.toml

shell: $(DEV_STAMP) ## write completion and the manual page anew from the command line's parser
	$(BIN)/python -m tests.build_shell

reliability: $(DEV_STAMP) ## one fault at position after position, written to docs/reliability.md
	$(BIN)/python -m tests.reliability

fuzz: $(DEV_STAMP) ## the guided fuzzer for a minute: make fuzz FUZZ_SECONDS=600
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

soak: $(DEV_STAMP) ## what takes hours: make soak SOAK_MINUTES=480
	$(BIN)/python -m tests.product --flashes 10000 --seed $$(date +%s)
	BRIDGED_CRASHES=2000 $(BIN)/python -m pytest -q tests/e2e/test_virtual_crash.py
	BRIDGED_FAULTS=10000 $(BIN)/python -m pytest -q tests/target/test_faults.py
	BRIDGED_SOAK=1 SOAK_MINUTES=$$(( $(SOAK_MINUTES) / 4 )) $(BIN)/python -m pytest --timeout 0 tests/console/test_throughput.py
	BRIDGED_CUTS=$(CUTS) BRIDGED_CUTS_SEED=$$(date +%s) BRIDGED_IDLE_S=$(IDLE_S) $(MAKE) vm-test ARGS='--timeout 0'
	BRIDGED_SOAK=1 $(BIN)/python -m pytest --timeout 900 tests/e2e/test_fleet.py
	test -x .cache/goosebit/bin/python || $(PYTHON) -m venv .cache/goosebit
	.cache/goosebit/bin/python -m pip install -qq --disable-pip-version-check goosebit==0.2.12
	BRIDGED_GOOSEBIT=.cache/goosebit/bin/python $(BIN)/python -m pytest tests/fleet/test_ddi.py
	$(BIN)/python -m tests.fleet.scale --gateways 1000
	$(BIN)/python -m tests.stub.mutations
	$(BIN)/python -m tests.stub.full_flash
	$(BIN)/python -m tests.fuzz.run --seconds $$(( $(SOAK_MINUTES) * 45 ))

bench: $(DEV_STAMP) ## beside stm32flash and others on one compiled device; writes docs/benchmarks.md: make bench ARGS=--quick
	@$(BIN)/python -m tests.bench.run $(ARGS)

release: $(DEV_STAMP) ## sdist and wheel into dist/, built twice and compared bit for bit
	@$(BIN)/python -m tests.build_release

deb: $(DEV_STAMP) ## the Debian package, into dist/: make deb ARGS="--arch arm64"
	@$(BIN)/python debian/build.py $(ARGS)

firmware: $(DEV_STAMP) ## build the firmware of the demo from its C source
	$(BIN)/python -m tests.build_firmware

firmware-check: $(DEV_STAMP) ## build it again and compare it with what is committed, bit for bit
	$(BIN)/python -m tests.build_firmware --check

stub: $(DEV_STAMP) ## build the second-stage loader from its C source
	$(BIN)/python -m tests.build_stub

stub-check: $(DEV_STAMP) ## build it again and compare it with what is committed, bit for bit
	$(BIN)/python -m tests.build_stub --check

lock: $(DEV_STAMP) ## choose package versions anew (hashes of every file, no addresses)
	$(LOCK) --group dev --group firmware --upgrade -o requirements-dev.lock
	$(LOCK) --group setup --constraints requirements-dev.lock --no-annotate -o requirements.lock
	@! grep -nE '://|^-' requirements.lock requirements-dev.lock

install: ## as root: the daemon for systemd under PREFIX, /opt/bridged
	./install.sh --no-uart --prefix $(abspath $(PREFIX))

clean: ## remove what was built
	rm -rf build dist .bench .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find bridged tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# --- the environment ---------------------------------------------------------------------------------------------------

# An environment that was copied or whose Python is gone is made anew.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; this is '"`$(PYTHON) -V`"'. Name another: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'python3-venv is missing: apt install python3-venv' >&2; exit 1; }
	@echo 'setting up $(VENV) (once)'
	@$(PYTHON) -m venv --clear $(VENV)

$(RUN_STAMP): $(VENV)/pyvenv.cfg requirements.lock pyproject.toml
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP) requirements-dev.lock
	@$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@
