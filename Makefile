# What a user and a developer call. The work is done by tests/bed/*.sh; each says what it does in its head.
#
#   make demo             all of it: install, build, start, and a container with Docker inside; says what it proved
#   make up | down        the bed: our daemons and an engine of our own. down keeps data unless PURGE=1
#   make -s env           eval "$(make -s env)" points `docker` at that engine
#   make images           sysbox/debian:SUITE (bookworm, trixie, sid) and sysbox/busybox in that engine
#   make build check test bench
#   make test-matrix      every part of the field that is tried, inside and outside; prints docs/COMPATIBILITY.md (about 20 minutes
#                         once its images and programs are made). PARTS=text: those with that in their name
#   make test-engines     the outer engines among them alone
#   make fuzz             searches for a config.json that does harm, by coverage; SECONDS_OF_FUZZ=60
#   make test-vm VM=path/to/vm [KERNEL=bookworm|trixie|sid]
#   make test-bare        what README.md says, in a Debian 12 that was just made and has nothing
#
# BED=name has any of them work on another bed beside the first.

BED ?= dev
SUITE ?= bookworm
export BED SUITE

.PHONY: help demo up env images down build check test bench fuzz test-matrix test-engines test-vm test-bare

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo up down env fuzz test-vm:
	@tests/bed/$@.sh

images:
	@tests/bed/image.sh $(SUITE)

test-bare:
	@tests/bed/bare.sh $(TARGETS)

build:
	@tests/bed/packages.sh build
	cargo build --release --workspace

check:
	cargo fmt --all --check
	@tests/bed/packages.sh build
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p sysbox-runc --features fuzz -- -D warnings

# Beds of their own: a run must not meet the containers of the bed that you work with.
test bench:
	@BED=$(if $(filter file default,$(origin BED)),$@,$(BED)) tests/bed/$@.sh

# A run that found faults is recorded as well; its status says that it did.
test-matrix test-engines:
	@$(if $(filter test-engines,$@),TESTS=outer_engine )BED=$(if $(filter file default,$(origin BED)),matrix,$(BED)) tests/bed/matrix.sh "$(PARTS)"
