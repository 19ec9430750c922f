# make test       every suite with what each promise needs, meant for 25 minutes; prints what it leaves out
# make test-all   every test at its full length: hours
# make test-fast  the unit tests and the behaviour matrix: no crash suites, no property test, no Xen
# make widths     lines that are too wide: comments over 110 columns, prose over 120
# make bench      side by side with qemu-img, QEMU's own jobs, virsh and lvcreate, a release build
# make demo       a domain of two disks, then a running guest: snapshots, destruction, reverts, deletes
# make build      the release binary: target/release/domsnap

CARGO ?= cargo
RELEASED := $(or $(CARGO_TARGET_DIR),target)/release/domsnap
NEXTEST ?= $(CARGO) nextest run
PYTHON := $(abspath $(or $(CARGO_TARGET_DIR),target)/python)

# The message of a failed test says what it was about; a backtrace would not.
export RUST_LIB_BACKTRACE = 0

# Places for tests (.config/nextest.toml): each takes two or more of them.
export NEXTEST_TEST_THREADS ?= $(shell expr 4 \* `nproc`)

.PHONY: all build test test-all test-fast widths words bench demo ci deps qemu nextest python under-test

all: build

build:
	$(CARGO) build --release --locked -p snapcli

deps:
	scripts/install-deps

# The tests with a real QEMU want both versions that are supported.
qemu:
	scripts/install-qemu

# cargo-nextest runs each test in a process of its own; without it the crash suites would share one.
nextest:
	@$(CARGO) nextest --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-nextest

# The suites run the real binary and preload the real shim: neither is a dependency that cargo would build for
# them. All of the workspace at once: `-p snapcli` alone would select other features of the dependencies, and
# every crate from there up would be compiled twice.
under-test:
	$(CARGO) build --workspace --locked --lib --bins --tests --examples

# Where python3 is the script of a version manager, each start of a plug-in waits for that: the tests start
# some thousand, so they get the interpreter itself.
python: deps
	mkdir -p $(PYTHON)
	ln -sfn "$$(python3 -c 'import sys; print(sys.executable)')" $(PYTHON)/python3

# The suites of domains at rest flush some hundred thousand times, which takes a quarter of their processor
# time on a disk. No test needs one to know whether a flush was missing: losses of power are made from a
# record of the flushes. `make test-all` has everything on the disk.
test test-fast: export DOMSNAP_TEST_IN_MEMORY := $(shell scripts/memory-for-tests)
test: deps qemu nextest python under-test
	PATH="$(PYTHON):$$PATH" $(NEXTEST) --workspace --locked
	$(CARGO) test --workspace --locked --doc
	@scripts/left-out

test-all: export NEXTEST_PROFILE = all
test-all: export DOMSNAP_TWICE_EVERY = 12
test-all: export DOMSNAP_STRIKES_EVERY = 1
test-all: export DOMSNAP_NEXT_EVERY = 1
test-all: export DOMSNAP_LIVE_EVERY = 1
test-all: export DOMSNAP_LIVE_OPERATIONS = 200
test-all: export DOMSNAP_GROUP_EVERY = 1
test-all: export DOMSNAP_POLICY_KILLS_EVERY = 1
test-all: export DOMSNAP_POWER_CASES = 240
test-all: export DOMSNAP_TEST_LVM_KIT = all
test-all: export TESTKIT_EVERY = 1
test-all: deps qemu nextest python under-test
	PATH="$(PYTHON):$$PATH" $(NEXTEST) --workspace --locked
	$(CARGO) test --workspace --locked --doc

test-fast: deps qemu nextest under-test
	$(NEXTEST) --workspace --locked -E 'not (binary(crash_kill) | binary(crash_power) | binary(crash_reflink) | binary(property) | package(xenguest))'

# BENCH="--quick --only merge-8 --dir DIR" measures less, or elsewhere.
bench: deps qemu build
	scripts/install-libvirt
	$(CARGO) run --release --locked -q -p domsnap-benches -- $(BENCH)
	$(if $(BENCH),,$(CARGO) run --release --locked -q -p lvmguest --example create_over_volumes -- $(RELEASED) 9)

widths words:
	@scripts/$@

demo: deps qemu build
	scripts/demo
	$(CARGO) run --locked -q -p testguest --example tour -- $(RELEASED)

ci:
	.ci/run
