# Two commands for everyone: make demo, make test. Needs Python 3.11 or newer, nothing else.
PYTHON ?= python3
MODEL ?= .cache/all-MiniLM-L6-v2
MINILM := .cache/all-MiniLM-L6-v2
# for the CPU build alone: make parity TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BENCH ?= .cache/bench

# suites with targets of their own
APART := reference real peers browser hub
TINY_CHECKPOINT = $(if $(TINY),--checkpoint tiny-qwen3=$(TINY))
NODE_PEERS := .cache/node-peers

BENCH_OPTIONS = --ours .venv/bin/python --stock .venv-reference/bin/python --tokenizer $(TOKENIZER) --work $(BENCH)
PEER_VENVS := .venv-openvino .venv-llama .venv-peers
PEER_OPTIONS := --openvino .venv-openvino/bin/python --llama .venv-llama/bin/python \
	--sentence-transformers .venv-peers/bin/python --fastembed .venv-peers/bin/python

.PHONY: demo test real hub lint parity peers conform browser screenshots bench quality clean help

help:
	@echo "make demo          build, verify, measure and use all-MiniLM-L6-v2 (MODEL=folder or Hub id for another)"
	@echo "make test          every test of tiny models, whose vectors can be worked out; needs no torch"
	@echo "make real          all-MiniLM-L6-v2's real weights: built as a user builds them, held against upstream's vectors"
	@echo "make hub           the Hub's verbs in processes of their own, killed and damaged"
	@echo "make lint          ruff and mypy"
	@echo "make parity        the suite against PyTorch, in an environment of its own"
	@echo "make peers         the card's snippets in sentence-transformers, fastembed, transformers.js and mteb; needs node and npm"
	@echo "make conform       every variant in the libraries of others, in Chromium too: docs/conform.md; TINY=checkpoint adds a decoder"
	@echo "make browser       the report in Chromium (make screenshots: and the docs' pictures of it)"
	@echo "make bench         the 0.6B shape against the stock path; needs TOKENIZER=folder; PEERS=1 adds others (see docs/guide/bench.md)"
	@echo "make quality       what every recipe keeps, on real text; needs DATA=folder and TINY=checkpoint (see docs/quality.md)"
	@echo "make clean         remove what these made"

demo: .venv/.installed $(if $(filter $(MINILM),$(MODEL)),$(MINILM)/model.safetensors)
	.venv/bin/python demo/demo.py $(MODEL)

test: .venv/.tested
	OPENBLAS_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 $(APART:%=--ignore tests/%)

real: .venv/.tested $(MINILM)/model.safetensors
	.venv/bin/python -m pytest tests/real

hub: .venv/.tested
	OPENBLAS_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests/hub

lint: .venv/.tested
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

parity: .venv-reference/.installed $(MINILM)/model.safetensors
	.venv-reference/bin/python -m pytest tests/reference

peers: .venv-conform/.installed $(NODE_PEERS)/.installed $(MINILM)/model.safetensors
	MINILM=$(MINILM) NODE_PEERS=$(NODE_PEERS) .venv-conform/bin/python -m pytest tests/peers

conform: .venv/.browser .venv-conform/.installed $(NODE_PEERS)/.installed $(MINILM)/model.safetensors
	@test -n "$(TINY)" || echo "make conform: WITHOUT the decoder: expected TINY=checkpoint of tiny-qwen3, found nothing; its table stays as it was" >&2
	.venv/bin/python benchmarks/conform.py --python .venv-conform/bin/python --node $(NODE_PEERS) --work .cache/conform \
		--checkpoint all-MiniLM-L6-v2=$(MINILM) $(TINY_CHECKPOINT)

browser: .venv/.browser
	.venv/bin/python -m pytest tests/browser

screenshots: .venv/.browser
	SCREENSHOTS=1 .venv/bin/python -m pytest tests/browser

bench: .venv/.installed .venv-reference/.installed $(MINILM)/model.safetensors $(if $(PEERS),$(PEER_VENVS:%=%/.installed))
	@test -n "$(TOKENIZER)" || { echo "make bench: expected TOKENIZER=folder with Qwen3-Embedding-0.6B's config.json and tokenizer.json, found nothing; see docs/guide/bench.md"; exit 2; }
	.venv/bin/python benchmarks/main_job.py $(BENCH_OPTIONS)
	.venv/bin/python benchmarks/engine.py $(BENCH_OPTIONS) --minilm $(MINILM) $(if $(TEXTS),--texts $(TEXTS)) $(if $(PEERS),$(PEER_OPTIONS))

# half an hour to an hour: everything that docs/quality.md says
quality: .venv/.installed $(MINILM)/model.safetensors
	@test -n "$(DATA)" && test -n "$(TINY)" || { echo "make quality: expected DATA=folder with STS and XQuAD, and TINY=checkpoint of a small decoder, found '$(DATA)' and '$(TINY)'; see docs/quality.md"; exit 2; }
	.venv/bin/python benchmarks/quality.py --data $(DATA) --minilm $(MINILM) --tiny $(TINY) --work $(BENCH)/quality

clean:
	rm -rf .venv .venv-reference .venv-conform $(PEER_VENVS) .cache demo/out

.python-checked:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"make: expected Python 3.11 or newer, found {v.major}.{v.minor}; run make PYTHON=/path/to/python3.11 …")'

.venv/.installed: pyproject.toml | .python-checked
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.tested: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

.venv-reference/.installed: pyproject.toml | .python-checked
	$(PYTHON) -m venv .venv-reference
	.venv-reference/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-reference/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[reference,test]' onnxscript
	@touch $@

.venv/.browser: .venv/.tested
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	@touch $@

# sentence-transformers 5 is the last whose ONNX backend optimum-onnx serves
.venv-conform/.installed: pyproject.toml | .python-checked
	$(PYTHON) -m venv .venv-conform
	.venv-conform/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-conform/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
		'sentence-transformers>=5.1,<6' optimum-onnx[onnxruntime] fastembed==0.9.1 'mteb>=2'
	@touch $@

# scripts: only to fetch CUDA
$(NODE_PEERS)/.installed:
	mkdir -p $(NODE_PEERS)
	npm install --silent --ignore-scripts --no-fund --no-audit --prefix $(NODE_PEERS) @huggingface/transformers@4.3.1
	@touch $@

.venv-openvino/.installed: | .python-checked
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 nncf==3.4.0
	@touch $@

.venv-llama/.installed: | .python-checked
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv-llama/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 gguf==0.19.0
	@touch $@

# torch first: asked for along with the rest, it would bring gigabytes of CUDA
.venv-peers/.installed: | .python-checked
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check sentence-transformers==6.2.0 fastembed==0.9.1
	@touch $@

$(MINILM)/model.safetensors: demo/weights.py demo/weights.txt | .venv/.installed
	.venv/bin/python demo/weights.py $(MINILM)
	@touch $@
