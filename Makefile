# make demo: set up, then show a policy on real TCP.  make test: set up, then run all tests.
# make bench: what rulesets, the compiler and tracked flows cost, into bench/results.
# make test-stock: those tests that load policies, before Debian's own kernel, emulated.

VENV := .venv
BIN := $(VENV)/bin
# What the Python packages and the tests need of Debian; the compiler and the headers are for
# NetfilterQueue, which comes as source. Only what is missing is installed.
DEBIAN := gcc libc6-dev libnetfilter-queue-dev libnftables1 nftables python3-dev python3-venv systemd
# What an emulated machine needs besides.
STOCK_DEBIAN := busybox-static kmod qemu-system-x86 zstd
PYTHON ?= python3

.PHONY: setup demo test test-stock nightly bench lint clean

setup: $(VENV)/.ready

# Python packages: again only when what is wanted changes.
$(VENV)/.ready: pyproject.toml | debian
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "itm needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.PHONY: debian stock-debian
debian: PACKAGES = $(DEBIAN)
stock-debian: PACKAGES = $(STOCK_DEBIAN)
debian stock-debian:
	@missing=""; for package in $(PACKAGES); do \
	  dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'install ok installed' \
	    || missing="$$missing $$package"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

demo: setup
	$(BIN)/itmc lab policies/size_aware.itm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto

# TESTS="…": these instead of its own choice, with any options of pytest.
test-stock: setup stock-debian
	$(BIN)/python -m tests.stock.boot $(TESTS)

# The long forms of the random tests: 20 000 packets before the kernel, 200 000 texts,
# 200 000 damaged packets.
nightly: setup
	ITM_POLICIES=200 ITM_FUZZ=200000 ITM_EXAMPLES=4000 ITM_PACKETS=200000 $(BIN)/pytest -n auto \
	  tests/test_parser.py tests/test_simplify.py tests/test_headers.py tests/kernel/test_random.py

# Close to nothing else should run on the machine. QUICK=--quick: all of it, small.
bench: setup
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m bench $(QUICK)

clean:
	rm -rf $(VENV) bench/.cache .stock dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
