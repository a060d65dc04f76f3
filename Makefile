# bridged: what a developer and CI run, the same lines on a laptop, a Raspberry Pi and a fresh machine.
# Needs: python3 (3.11 or newer) with venv, make. No compiler. `make` alone lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= config/bridged.toml
PREFIX ?= /opt/bridged
FUZZ_SECONDS ?= 60
SOAK_MINUTES ?= 120
# Most tests wait for a wire in real time, so that more of them than there are cores go side by side.
TEST_JOBS    ?= $(shell echo $$(( $$(nproc) + 2 )))

# Two sets of locked packages, so that who only wants to try it does not install compilers and test tools.
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
PIP       := $(BIN)/python -m pip install -qq --disable-pip-version-check
LOCK      := $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
             --no-header --no-emit-index-url --no-emit-find-links

.DEFAULT_GOAL := help
.PHONY: shell vm-test deb reliability help venv demo test check format lock reference fuzz soak bench firmware firmware-check stub stub-check run sim install clean distclean

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

vm-test: $(DEV_STAMP) ## a real gateway in a virtual machine: systemd, GPIO chip, serial ports, power cuts (as root, Debian 12)
	@$(BIN)/python -m pytest tests/vm $(ARGS)

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
	$(BIN)/python -c 'from bridged import config; print(config.reference(), end="")' > config/bridged.toml.new
	mv config/bridged.toml.new config/bridged.toml

shell: $(DEV_STAMP) ## write completion and the manual page anew from the command line's parser
	$(BIN)/python -m tests.build_shell

reliability: $(DEV_STAMP) ## one fault at position after position, written to docs/reliability.md
	$(BIN)/python -m tests.reliability

fuzz: $(DEV_STAMP) ## the guided fuzzer for a minute: make fuzz FUZZ_SECONDS=600
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

soak: $(DEV_STAMP) ## what takes hours: make soak SOAK_MINUTES=480
	$(BIN)/python -m tests.product --flashes 10000 --seed $$(date +%s)
	BRIDGED_FAULTS=10000 $(BIN)/python -m pytest -q tests/target/test_faults.py
	BRIDGED_SOAK=1 SOAK_MINUTES=$$(( $(SOAK_MINUTES) / 4 )) $(BIN)/python -m pytest --timeout 0 tests/console/test_throughput.py
	$(BIN)/python -m tests.stub.mutations
	$(BIN)/python -m tests.stub.full_flash
	$(BIN)/python -m tests.fuzz.run --seconds $$(( $(SOAK_MINUTES) * 45 ))

bench: $(DEV_STAMP) ## beside stm32flash and others on one compiled device; writes docs/benchmarks.md: make bench ARGS=--quick
	@$(BIN)/python -m tests.bench.run $(ARGS)

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
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python -m pip install --quiet --require-hashes -r requirements.lock
	$(PREFIX)/bin/python -m pip install --quiet --no-deps --no-build-isolation .
	install -D -m 644 -t /etc/systemd/system systemd/bridged.service systemd/bridged*.socket
	install -D -m 644 systemd/bridged.tmpfiles /etc/tmpfiles.d/bridged.conf
	install -D -m 644 systemd/bridged.catalog /usr/lib/systemd/catalog/bridged.catalog
	sed -i 's|/opt/bridged/|$(abspath $(PREFIX))/|' /etc/systemd/system/bridged.service
	install -D -m 644 systemd/bridged.sysusers /etc/sysusers.d/bridged.conf
	install -D -m 644 -t /etc/udev/rules.d systemd/60-bridged.rules
	test -e /etc/bridged/bridged.toml || install -D -m 644 config/bridged.toml /etc/bridged/bridged.toml
	@echo 'installed; next:  systemd-sysusers && systemd-tmpfiles --create bridged.conf && udevadm control --reload'
	@echo '                  journalctl --update-catalog && systemctl daemon-reload'
	@echo 'then edit /etc/bridged/bridged.toml and:  systemctl enable --now bridged'

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
