# Every target sets up its own environment: a fresh machine needs Python 3.11 and make.
PYTHON ?= python3.11
VENV   := .venv
PY     := $(VENV)/bin/python
# Elsewhere than on a GPU machine, TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu" saves gigabytes.
TORCH_FLAGS ?=
SECONDS_TO_RUN ?= 60
DATA ?= ../shared/data
N ?= 100
MESSAGES ?= 1000000
BENCH ?=
UP ?=
DOWN ?=
DRILL ?=
SOAK ?=
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check audit format crash-test crash-test-trainer cluster-test fuzz fuzz-weights
.PHONY: bench-ingest bench-latency bench-restore bench-delta bench-replay bench-table bench-vocabulary
.PHONY: bench-candidates bench-offline bench-streaming bench-ablations up down secrets drill soak bench-attention
.PHONY: clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(TORCH_FLAGS) -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed  ## build .venv with everything the demo and the tests need

demo: $(VENV)/installed  ## the whole system on this machine for SECONDS_TO_RUN seconds
	$(PY) -m streamgr demo --seconds $(SECONDS_TO_RUN)

test: check  ## the linters, then every test (real Kafka: set KAFKA_HOME or KAFKA_BOOTSTRAP)
	$(PY) -m pytest

check: $(VENV)/installed  ## ruff, mypy --strict, the layer contracts and the audit
	$(VENV)/bin/ruff check streamgr tests
	$(VENV)/bin/ruff format --check streamgr tests
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m tests.ops.audit

audit: $(VENV)/installed  ## the dependencies against the public advisories; says so where nobody can be asked
	$(PY) -m tests.ops.audit

format: $(VENV)/installed  ## put the code into its format
	$(VENV)/bin/ruff check --fix streamgr tests
	$(VENV)/bin/ruff format streamgr tests

crash-test: $(VENV)/installed  ## N random kills of sequencers and broker during a replay, then everything against the oracle
	$(PY) -m tests.crash --kills $(N)

crash-test-trainer: $(VENV)/installed  ## N kills of a trainer, at least one at each point of its life, then everything bit for bit
	$(PY) -m tests.crash.ordeal --kills $(N)

cluster-test: $(VENV)/installed  ## three brokers, killed and frozen one after the other (KAFKA_HOME)
	STREAMGR_CLUSTER_TESTS=1 $(PY) -m pytest tests/cluster

fuzz: $(VENV)/installed  ## MESSAGES mutated records: each in a sequence or in the dead letters with its reason
	$(PY) -m tests.fuzz.records --messages $(MESSAGES)

fuzz-weights: $(VENV)/installed  ## N damaged and N lying weights logs: the trainer's exact state, or a named refusal
	STREAMGR_WEIGHTS_FUZZ=$(N) $(PY) -m pytest tests/weights/test_fuzz.py

bench-ingest: $(VENV)/installed  ## events per second through the stream side, by stage and by history length
	$(PY) -m tests.bench.ingest $(BENCH)

bench-latency: $(VENV)/installed  ## from the broker's append to the sequence at 1, 10 and 30 thousand events a second
	$(PY) -m tests.bench.latency $(BENCH)

bench-restore: $(VENV)/installed  ## replay, checkpoint, snapshot and restore of a million events
	$(PY) -m tests.bench.restore $(BENCH)

bench-delta: $(VENV)/installed  ## a weights delta of 100,000 rows: cut, serialise, verify, apply, roll back; its bytes
	$(PY) -m tests.bench.delta $(BENCH)

bench-replay: $(VENV)/installed  ## replay real logs through the real pipeline: exactness and prequential quality
	$(PY) -m streamgr evaluate $(DATA)/deskdrop/events.csv.gz --set sequence.history_length=64
	$(PY) -m streamgr evaluate $(DATA)/ebnerd_slice/events.csv.gz --set sequence.history_length=64

bench-table: $(VENV)/installed  ## ids per second to slots, beside a dict, id % size, sorted search and linear probing
	$(PY) -m tests.bench.table $(BENCH)

bench-vocabulary: $(VENV)/installed  ## quality under churn at equal memory: our table and its parts beside hashed and static ones
	$(PY) -m tests.bench.vocabulary --data $(DATA) $(BENCH)

bench-candidates: $(VENV)/installed  ## latency against 1 to 4096 candidates: with cache, in one pass, one by one; over HTTP
	$(PY) -m tests.bench.candidates $(BENCH)

bench-offline: $(VENV)/installed  ## HSTU beside SASRec in one trainer, leave one out (ML-1M, ML-100K, latest-small); goes on where it was
	$(PY) -m tests.bench.offline --data $(DATA) $(BENCH)

bench-streaming: $(VENV)/installed  ## attention with and without softmax, and Transformers, on a vocabulary that grows, one pass
	$(PY) -m tests.bench.streaming $(BENCH)

bench-ablations: $(VENV)/installed  ## what each part of the model is worth on our own streams
	$(PY) -m tests.bench.ablations --data $(DATA) $(BENCH)

up:  ## the whole system in containers (UP="--profile demo": with a simulated site); http://127.0.0.1:8090
	docker compose $(UP) up --detach --build --wait

down:  ## stop the containers; their volumes stay (DOWN=--volumes: they go too)
	docker compose --profile demo down $(DOWN)

secrets: compose/secrets/grafana_admin  ## a password for Grafana's administrator (compose/admin.yaml), unless there is one

compose/secrets/grafana_admin:
	mkdir -p -m 700 $(@D)
	python3 -c 'import secrets; print(secrets.token_urlsafe(24))' >$@ && chmod 644 $@

drill: $(VENV)/installed  ## break a stack of containers in every way, and see it heal, say so and lose nothing (DRILL=…)
	$(PY) -m tests.ops.drill $(DRILL)

soak: $(VENV)/installed  ## freshness over ten minutes at 300 events a second (SOAK=…)
	$(PY) -m tests.ops.soak $(SOAK)

bench-attention: $(VENV)/installed  ## tokens per second and memory of HSTU's attention beside a padded one and a Transformer
	$(PY) -m tests.bench.attention --data $(DATA) $(BENCH)

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist reports
