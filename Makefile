# setup: .venv with everything | demo: the whole road on a small shop | check: style and types | test: all tests
# serve: the service and its page on the demo's adapter | bench: side by side with peft + transformers
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo serve check test bench

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python examples/demo.py

serve: setup
	test -f runs/demo/adapter_model.safetensors || $(BIN)/python examples/demo.py
	$(BIN)/alpaca-lora serve --config configs/serve.yml --lora shop=runs/demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: setup
	$(BIN)/pytest -q -n 2

bench: setup
	$(BIN)/python benchmarks/bench_finetune.py
