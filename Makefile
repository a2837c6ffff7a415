# `make help` says what there is to make.

PREFIX ?= /usr
DESTDIR ?=

# Rust may have come from rustup a minute ago.
export PATH := $(PATH):$(HOME)/.cargo/bin

programs := target/x86_64-unknown-linux-gnu/release
dist := target/podhull
staged := target/host
installed_tests := /opt/podhull-tests
host := tests/host/run --install $(staged)

# How often a test repeats what must never fail: enough to see a mistake, or enough to trust the absence of one.
repeat_test := 3
repeat_soak := 200

.DEFAULT_GOAL := all
.PHONY: all bench clean conformance help host host-packages image install kernel kubernetes lint packages programs run soak stage stage-native test

help:
	@echo 'make                 build podhull, its guest kernel and its guest image into $(dist)'
	@echo 'make run             show a container in a virtual machine of its own, on this machine as it is (needs root)'
	@echo 'make test            run all tests; so does CI (needs root)'
	@echo 'make bench           measure against runc, crun and QEMU microvm: a table, and JSON and SVG in target/bench'
	@echo 'make conformance     run the tests of runc and of OCI runtime-tools, with podhull and with runc (needs root)'
	@echo 'make kubernetes      run pods of podhull and of runc in a small Kubernetes, and compare them (needs root)'
	@echo 'make soak            the tests that repeat, $(repeat_soak) times instead of $(repeat_test), and those two'
	@echo 'make lint            formatting and clippy, warnings denied, and shellcheck'
	@echo 'make install         into $$(DESTDIR)$$(PREFIX), by default $(PREFIX)'
	@echo "make host CMD='...'  run a command in the software host, podhull installed; IN=DIR at /in, /out to OUT=DIR"
	@echo 'make clean           remove target/; what is slow to make stays in ~/.cache/podhull'
	@echo
	@echo 'run, test, bench, kubernetes, soak and host install the system packages they miss, and use the software host, an emulated'
	@echo 'machine with KVM, wherever hardware KVM is missing. From nothing, on two cores, `make run` takes about 20 minutes.'

all: kernel programs
	@$(programs)/podhull-rootfs-builder --agent $(programs)/podhull-agent --output $(dist)/guest.img

packages:
	@tests/host/install-packages build

host-packages: packages
	@tests/host/install-packages host

# The software host. Not needed before the tests run, so that under -j it is made beside what is built.
image: host-packages
	@tests/host/build-image >/dev/null
	@tests/host/build-image forky >/dev/null

kernel: packages
	@mkdir -p $(dist)
	@guest-kernel/build $(dist)

# After the kernel, so that the two do not print across each other under -j.
programs: packages kernel
	@[ -e $(programs)/podhull ] || echo 'Rust programs: about 4 minutes the first time' >&2
	@cargo build --release -p podhull -p podhull-agent -p podhull-rootfs-builder

# $(call install_into,ROOT)
define install_into
	@install -D -m 755 $(programs)/podhull $(1)/bin/podhull
	@ln -sf podhull $(1)/bin/containerd-shim-podhull-v2
	@ln -sf podhull $(1)/bin/containerd-shim-kata-v2
	@install -D -m 644 $(dist)/vmlinux $(1)/lib/podhull/vmlinux
	@install -D -m 644 $(dist)/guest.img $(1)/lib/podhull/guest.img
	@rm -rf $(1)/share/podhull && mkdir -p $(1)/share/podhull && cp -r --no-preserve=ownership deploy/. $(1)/share/podhull
endef

install: all
	$(call install_into,$(DESTDIR)$(PREFIX))

# What the software host gets: the installed files as a package would have them, and the tests.
stage: all host-packages
	@cargo build --release -p podhull-tests -p podhull-rogue
	@rm -rf $(staged)
	$(call install_into,$(staged)/usr)
	@install -D -t $(staged)$(installed_tests) $(programs)/podhull-e2e $(programs)/podhull-bench \
		$(programs)/podhull-conformance $(programs)/podhull-kubernetes tests/host/demo
	@$(programs)/podhull-rootfs-builder --agent $(programs)/podhull-rogue --output $(staged)$(installed_tests)/rogue.img

# And the agent's native tests.
stage-native: stage
	@cargo test --no-run -p podhull-agent --test native
	@install $$(cargo test --no-run -p podhull-agent --test native 2>&1 | sed -n 's/.*(\(.*\))$$/\1/p') \
		$(staged)$(installed_tests)/agent-native
	@install -t $(staged)$(installed_tests) $(programs)/podhull-agent

run: stage
	@echo "Hardware KVM: $$(tests/host/has-kvm)" >&2
	@$(host) $(installed_tests)/demo

test: stage-native image
	guest-kernel/test
	@echo 'Unit tests: about 4 minutes the first time' >&2
	cargo test --workspace
	@echo "Hardware KVM: $$(tests/host/has-kvm)" >&2
	@echo 'End-to-end tests: about 50 minutes in software hosts' >&2
	TIMEOUT=4200 tests/host/end-to-end $(repeat_test)

soak: stage-native
	TIMEOUT=14400 tests/host/end-to-end $(repeat_soak)
	TIMEOUT=7200 tests/conformance/run
	TIMEOUT=3600 tests/kubernetes/run

conformance: stage
	TIMEOUT=7200 tests/conformance/run

kubernetes: stage
	TIMEOUT=3600 tests/kubernetes/run

bench: stage
	TIMEOUT=3600 $(host) --out target/bench 'cd /out && $(installed_tests)/podhull-bench'

# make itself exits with 2 whatever the command's failure was; tests/host/run exits with the command's own status.
host: stage
	@$(host) $(if $(IN),--in '$(IN)') $(if $(OUT),--out '$(OUT)') '$(subst ','\'',$(value CMD))'

lint:
	@tests/host/install-packages build lint
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	shellcheck -S warning .ci/run guest-kernel/build guest-kernel/check-config $(filter-out %/packages %/fstab %/image %/job,$(wildcard tests/host/* tests/host/job/*)) \
		$(addprefix tests/conformance/,build-suites compile run) $(addprefix tests/kubernetes/,build compile run) tests/deploy/kubectl

clean:
	rm -rf target
