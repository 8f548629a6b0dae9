# Shorthands for those who work on Pontoon. Nothing here is needed to use it:
# `go test ./...` tests everything, `go build` builds it.

PKG      ?= ./...
FUZZTIME ?= 30s
COUNT    ?= 50
BENCH    ?= .
DURATION ?= 10m
SEED     ?= 0
SIM      ?= -sim.duration=1h -sim.seed=1000000

.PHONY: help test race lint fuzz stress sweep chaos bench ci clean sim overload mutants

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' Makefile

test: ## run all tests, as the README does
	go test ./...

race: ## run all tests under the race detector
	go test -race ./...

lint: ## gofmt, vet, staticcheck, tidy modules, and the rules of lint_test.go
	./.ci/run format modules vet staticcheck
	go test -run TestLint .

mutants: ## break the program in each of the ways of mutantlist_test.go, and see which test notices: 15 minutes
	go test -v -timeout 0 -run '^TestMutants$$' . -mutants -mutant '$(MUTANT)'

fuzz: ## run every fuzz target for FUZZTIME (30s), in PKG (./...)
	@set -e; for pkg in $$(go list $(PKG)); do \
		for target in $$(go test -list '^Fuzz' $$pkg); do \
			case $$target in Fuzz*) ;; *) continue ;; esac; \
			echo "== $$pkg $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

stress: ## run the tests RUN (a pattern) COUNT (50) times under the race detector
	@test -n '$(RUN)' || { echo 'say which: make stress RUN=TestName' >&2; exit 2; }
	go test -race -count=$(COUNT) -run '$(RUN)' $(PKG)

chaos: ## break the network and the processes of a cluster for DURATION (10m), as root; SEED repeats a run
	go test -v -timeout 0 -run '^TestProcess(Chaos|DiskEmpty)$$' -chaos.duration $(DURATION) -chaos.seed $(SEED) .

sweep: ## damage every bit of a member's files, and start from what a power loss leaves after each system call
	go test -v -timeout 60m -run '^(TestDamageIsNoticed|TestCrashImages)$$' . -sweep.all -crash.all

sim: ## simulate clusters for long: SIM='-sim.duration=1h -sim.seed=1000000'; adds a line to docs/simulation.md
	go test -run 'TestSim$$' -timeout 0 . $(SIM) -sim.ledger=docs/simulation.md

overload: ## attack a process with thousands of connections, for minutes, and print what it cost
	go test -v -timeout 20m -run '^(TestOverload|TestDescriptorsAreReserved)$$' . -overload.full

bench: ## run the benchmarks BENCH (all) in PKG
	go test -run '^$$' -bench '$(BENCH)' -benchmem $(PKG)

ci: ## everything a commit has to pass
	./.ci/run

clean: ## remove what builds leave behind; the data in pontoon-*/ stays
	rm -f pontoon .build.lock *.test *.prof
