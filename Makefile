# Each target does all the set-up that it needs; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
# pip options for torch alone: where your pip's index has CUDA builds only, name PyTorch's CPU index here
TORCH_INDEX ?=
# tests run in this many processes, each with one thread
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# libgomp's threads spin while they wait, which makes a busy machine many times slower; set before torch is imported
export OMP_WAIT_POLICY := PASSIVE

.PHONY: install demo test check bench docs clean

install: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH_INDEX) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python -m fieldsmith demo --out demo

test: install
	@! $(BIN)/pip list 2>/dev/null | grep -iE '^(nvidia|triton|torchvision|torchaudio)' || \
		command -v nvidia-smi >/dev/null 2>&1 || { echo 'CUDA or torchvision packages in a CPU environment: rm -rf $(VENV), then make install'; exit 1; }
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

check: install
	$(BIN)/ruff format --check src experiments tests benchmarks
	$(BIN)/ruff check src experiments tests benchmarks
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks

# the site, in site/; what builds it has an environment of its own, since the library never needs it
docs: $(VENV)-docs/ready
	$(VENV)-docs/bin/mkdocs build --quiet

$(VENV)-docs/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs demo site
