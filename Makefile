# The two commands: `make demo` and `make test`. `make help` lists the others.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
BUILD := $(TARGET)/release

.PHONY: help build demo test torture fuzz sanitize bench docs header clean
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

build: ## the library and the command, optimised, into target/release
	@tools/need.sh build
	$(CARGO) build --release
	ln -sf libnblock.so $(BUILD)/libnblock.so.0

demo: build ## builds everything and shows it at work
	demo/run.sh

# These say what they will download or install, and do it; NBLOCK_NO_INSTALL=1 makes them fail with the list.

test: ## runs every test
	tests/run.sh

torture: ## the history test for longer, in all languages, forks in handlers, daemons, and ten million cycles: TORTURE_GRANTS=200000 TORTURE_SEED=1
	NBLOCK_TORTURE_GRANTS=$(or $(TORTURE_GRANTS),200000) NBLOCK_TORTURE_SEED=$(or $(TORTURE_SEED),1) tests/run.sh history
	NBLOCK_TORTURE_FORKS=20000 tests/c/run.sh forks
	$(CARGO) test --test proof descriptors -- --nocapture
	NBLOCK_TORTURE_CYCLES=10000000 $(CARGO) test --test proof resources::cycles -- --nocapture

fuzz: ## foreign bytes under libFuzzer: FUZZ_SECONDS=60 for each of FUZZ_TARGETS, which are all of fuzz/fuzz_targets
	fuzz/run.sh $(or $(FUZZ_SECONDS),60) $(FUZZ_TARGETS)

sanitize: ## the C programs on a library built for AddressSanitizer; the handle table under that and ThreadSanitizer
	tests/c/run.sh instrumented handles

bench: ## measures, each figure beside what it is compared with
	@tools/need.sh bench
	@$(MAKE) --no-print-directory build
	benches/run.sh

docs: ## builds the documentation site into .build/docs, and opens it if there is a desktop
	@docs/build.sh --open

header: ## writes include/nblock.h from src/ffi
	$(CARGO) build
	cp "$$(ls -t $(TARGET)/debug/build/nblock-*/out/nblock.h | head -n 1)" include/nblock.h

include packaging/install.mk

clean: ## removes what was built
	$(CARGO) clean
	rm -rf .build
