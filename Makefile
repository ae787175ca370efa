# make demo: from a fresh clone to text from a model trained here, in about four minutes and
# without a network but a package index. make serve: that model, trained if there is none, behind an
# endpoint and a page at the address that it prints (PORT=8001 for another). make test: all tests
# but the slow ones, on all cores up to four (PARALLEL= for one after another), or those in
# TESTS=files. make test-all: the slow ones too.

PYTHON ?= python3
OUT ?= out-demo
PORT ?= 8000
PARALLEL ?= -n auto --maxprocesses=4 --dist=worksteal

.PHONY: demo serve test test-all lint clean

demo: .venv/installed
	.venv/bin/python data/python_source/prepare.py
	.venv/bin/python train.py config/train_python_source.py --out_dir=$(OUT)
	.venv/bin/python sample.py --out_dir=$(OUT) --start="    def " \
		--num_samples=3 --max_new_tokens=200 --temperature=0.8
	@echo "checkpoint: $(OUT)/ckpt.pt   loss curve: $(OUT)/loss.png   metrics: $(OUT)/metrics.jsonl"
	@echo "your turn:  .venv/bin/python sample.py --out_dir=$(OUT) --start='class '"

serve: .venv/installed $(OUT)/ckpt.pt
	.venv/bin/python serve.py --out_dir=$(OUT) --port=$(PORT)

$(OUT)/ckpt.pt: | .venv/installed
	.venv/bin/python data/python_source/prepare.py
	.venv/bin/python train.py config/train_python_source.py --out_dir=$(OUT)

test: .venv/tested
	.venv/bin/python -m pytest -q -m "not slow" $(PARALLEL) $(TESTS)

test-all: .venv/tested
	.venv/bin/python -m pytest -q $(PARALLEL)

lint: .venv/tested
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/tested: .venv/installed tests/requirements.txt
	.venv/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv $(OUT)
