# Everything runs from a virtual environment in .venv, which is set up on first use.
# Needed beforehand: Python 3.11 or later with its headers, gcc, make and a package index.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SANITIZED := build/sanitize

INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -name '*.[ch]') setup.py pyproject.toml

SANITIZED_TESTS := $(wildcard $(addprefix tests/test_,kernels.py boundary.py functional.py golden.py layers.py))

.DEFAULT_GOAL := build
.PHONY: build test test-slow zoo distributed peft-suite soak fuzz leaks lint format docs demo bench sanitize clean

build: $(BUILT)  ## the extension, in place, with warnings as errors

test: $(BUILT)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(BUILT)  ## what `make test` runs in a short form
	$(BIN)/python -m pytest -m slow $(ARGS)

zoo: $(BUILT)  ## small networks of many architectures, each through the life of an adapter
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_zoo.py $(ARGS)

distributed: $(BUILT)  ## several processes: DistributedDataParallel, fully_shard, torchrun, accelerate
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_distributed.py tests/test_fsdp.py tests/test_launchers.py $(ARGS)

peft-suite: $(BUILT)  ## PEFT's own tests, from its source distribution, with FLoRA as the method
	$(BIN)/python tests/peft_suite $(ARGS)

soak: $(BUILT)  ## one process through a thousand adapters, which it must not remember
	$(BIN)/python -m pytest -m slow tests/test_soak.py $(ARGS)

fuzz: $(BUILT)  ## forged arrays and spoilt adapter files; half an hour. ARGS="--seed 7" for other ones
	$(BIN)/python tests/fuzz --cases 200000 $(ARGS)
	$(BIN)/python tests/fuzz --what files --cases 20000 $(ARGS)

leaks: $(BUILT)  ## every C function, 100,000 calls of every kind that succeeds or is refused; half an hour
	for script in tests/leaks/*.py; do $(BIN)/python $$script --calls 100000 || exit; done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict flora
	find csrc -name '*.[ch]' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.[ch]' | xargs $(BIN)/clang-format -i

docs: $(INSTALLED)  ## the site, in build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

demo: $(BUILT)
	$(BIN)/python -m flora finetune --output runs/demo $(ARGS)

bench: $(BUILT)  ## flora beside its peers; about twenty minutes on a quiet machine. ARGS=--help lists the options
	$(BIN)/python -m benchmarks $(ARGS)

# A build of its own beside the normal one. The tests run from its folder, so that it is the one they import. What Python
# itself never frees is no leak of ours, and freed memory is held only briefly, as some tests watch the process grow.
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	FLORA_DEVELOP=1 FLORA_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)/objects \
	  --build-lib $(SANITIZED)/lib
	cd $(SANITIZED)/lib && export PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib UBSAN_OPTIONS=halt_on_error=1 \
	  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" && \
	  $(CURDIR)/$(BIN)/python -c 'import flora._core as c; assert "$(SANITIZED)" in c.__file__, c.__file__' && \
	  $(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	    $(addprefix $(CURDIR)/,$(SANITIZED_TESTS)) $(ARGS)

clean:
	rm -rf build dist runs *.egg-info $(BUILT) flora/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flora tests benchmarks examples -name __pycache__ -prune -exec rm -r {} +

# The stamps are made last, so that an interrupted installation is taken up again; a broken environment is made anew.
$(INSTALLED): constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --requirement constraints.txt
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	FLORA_DEVELOP=1 $(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable .
	touch $@
