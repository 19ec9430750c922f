# make test       every suite, a debug build of the binary under test
# make test-fast  the unit tests and the behaviour matrix: no crash suites, no property test, nothing inside Xen
# make bench      side by side with qemu-img, QEMU's own jobs, virsh and lvcreate, a release build
# make demo       a domain of two disks, then a running guest: snapshots, destruction, reverts, deletes, proofs
# make build      the release binary: target/release/domsnap

CARGO ?= cargo
NEXTEST ?= $(CARGO) nextest run

# Failures of the suites tell their story in words.
export RUST_LIB_BACKTRACE = 0

.PHONY: all build test test-fast bench demo ci deps qemu nextest under-test

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

# The suites run the real binary and preload the real shim: neither is a dependency that cargo would build for them.
under-test:
	$(CARGO) build --locked -p snapcli -p faultfs
	$(CARGO) build --locked -p snapcli --example revert_loop

test: deps qemu nextest under-test
	$(NEXTEST) --workspace --locked
	$(CARGO) test --workspace --locked --doc

test-fast: deps qemu nextest under-test
	$(NEXTEST) --workspace --locked -E 'not (binary(crash_kill) | binary(crash_power) | binary(crash_reflink) | binary(property) | package(xenguest))'

# BENCH="--quick --only merge-8 --dir DIR" measures less, or elsewhere.
bench: deps qemu build
	scripts/install-libvirt
	$(CARGO) run --release --locked -q -p domsnap-benches -- $(BENCH)
	$(if $(BENCH),,$(CARGO) run --release --locked -q -p lvmguest --example create_over_volumes -- target/release/domsnap 9)

demo: deps qemu build
	scripts/demo
	$(CARGO) run --locked -q -p testguest --example tour -- target/release/domsnap

ci:
	.ci/run
