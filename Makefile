# Each target is a line or two; what is long lives in deploy/ and demo/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help deps build demo test bench golden clean

help: ## What there is to make
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## RabbitMQ and PostgreSQL from Debian, libtorch from PyPI into .deps/
	@deploy/install-dependencies.sh

build: deps ## The two binaries, in release mode
	cargo build --release --locked --bins

demo: build ## Prompts in, pictures out, on this machine, with a contact sheet to look at
	@demo/run.sh

test: deps ## Everything that CI runs
	@deploy/run-tests.sh

clean: ## Remove build outputs and the local stack's data; keeps .deps
	cargo clean
	rm -rf .darkroom demo/out
