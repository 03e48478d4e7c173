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

.PHONY: install demo test check bench docs lock oldest audit clean

install: $(VENV)/ready

# torch comes from an index of its own on some machines, so that its files have no hashes here; all others have
$(VENV)/ready: pyproject.toml constraints.txt requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH_INDEX) torch
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements-dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
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

# tools that nothing else needs, apart from the environment that is tested
TOOLS := .venv-tools
$(TOOLS)/ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet uv pip-audit
	touch $@

# what comes with torch from its own index
OUTSIDE := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

lock: $(TOOLS)/ready
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --generate-hashes \
		--python-version 3.11 --python-platform linux $(addprefix --no-emit-package ,$(OUTSIDE)) --no-emit-index-url \
		--no-annotate --no-header --output-file requirements-dev.lock

oldest: $(TOOLS)/ready
	$(TOOLS)/bin/uv pip compile pyproject.toml --resolution lowest-direct --python-version 3.11 --python-platform linux \
		$(addprefix --no-emit-package ,$(filter-out torch,$(OUTSIDE))) --no-annotate --no-header

# fails where a package has a known flaw; what the database does not answer for, or where it cannot be reached, is said
audit: $(TOOLS)/ready
	@$(TOOLS)/bin/pip-audit --disable-pip --require-hashes --requirement requirements-dev.lock --progress-spinner off \
		>$(TOOLS)/audit.log 2>&1; code=$$?; cat $(TOOLS)/audit.log; \
		asked=$$(grep -c == requirements-dev.lock); skipped=$$(grep -c 'could not be audited' $(TOOLS)/audit.log); \
		if grep -qE 'ConnectionError|ServiceError|Max retries|HTTPError|timed out' $(TOOLS)/audit.log; then skipped=$$asked; \
			code=0; fi; \
		echo "audit: the database of known flaws answered for $$((asked - skipped)) of $$asked packages"; \
		[ $$skipped -lt $$asked ] || echo 'audit: it cannot be reached from here, so nothing was checked'; exit $$code

clean:
	rm -rf $(VENV) $(VENV)-docs $(TOOLS) demo site
