# Each target is a line or two; what is long lives in deploy/ and demo/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help deps build demo test bench bench-fleet chaos load guards clean

help: ## What there is to make
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## RabbitMQ and PostgreSQL from Debian, libtorch from PyPI into .deps/
	@deploy/install-dependencies.sh

build: deps ## The two binaries, in release mode
	cargo build --release --locked --bin darkroom --bin darkroom-worker

demo: build ## Prompts in, pictures out, on this machine, with a contact sheet to look at
	@demo/run.sh

test: ## Everything that CI runs
	@deploy/install-dependencies.sh --tests
	@deploy/run-tests.sh

bench: build ## The model's speed on this machine, beside diffusers if PYTHON (python3) has it
	@bench/run.sh

chaos: build ## Ten minutes of faults under load (CHAOS_SECONDS, CHAOS_SEED), then the promises are checked
	cargo build --release --locked --bin chaos
	@target/release/chaos

load: build ## Fifty workers and a backlog (LOAD_JOBS, LOAD_WORKERS), and what grows meanwhile
	cargo build --release --locked --bin load
	@target/release/load

guards: deps ## Removes each promise's guards, one at a time, and sees tests fail (GUARDS=P1,P4 for some); half an hour
	cargo build --locked --workspace --features worker/failpoints,scheduler/failpoints --bins
	@$${CARGO_TARGET_DIR:-target}/debug/guards

bench-fleet: build ## The control plane at its limit beside each server alone (BENCH_JOBS …), and what that means for larger fleets
	cargo build --release --locked --bin bench-fleet --bin capacity
	@BENCH_JSON=target/bench-fleet.json target/release/bench-fleet
	@BENCH_JSON=target/bench-fleet-small.json BENCH_MICROBATCH=4 target/release/bench-fleet
	@target/release/capacity target/capacity.png target/bench-fleet.json target/bench-fleet-small.json

clean: ## Remove build outputs and the local stack's data; keeps .deps
	cargo clean
	rm -rf .darkroom demo/out
