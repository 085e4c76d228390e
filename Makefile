# Everything runs from a virtual environment in .venv, which is set up on first use.
# Needed beforehand: Python 3.11 or later with its headers, gcc, make and a package index.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
SANITIZED := build/sanitize
NATIVE := build/native
CALLS := many

INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -name '*.[ch]') setup.py pyproject.toml

SANITIZED_TESTS := $(wildcard $(addprefix tests/test_,kernels.py boundary.py functional.py golden.py layers.py))

.DEFAULT_GOAL := build
.PHONY: build test test-slow zoo distributed peft-suite soak crash-saves fuzz leaks lint format docs demo bench study \
  sanitize sanitize-fuzz native native-asan native-tsan native-valgrind cross native-clang native-aarch64 clean

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

soak: $(BUILT)  ## twenty minutes of adapters at random beside plain twins, then a thousand that must not be remembered
	$(BIN)/python tests/soak.py $(ARGS)
	$(BIN)/python -m pytest -m slow tests/test_soak.py

crash-saves: $(BUILT)  ## saves that are killed, that find the disk full, that run at once; as root also on a disk of its own
	$(BIN)/python tests/crash_saves.py $(ARGS)

fuzz: $(BUILT)  ## forged arrays and spoilt adapter files. ARGS="--seed 7" for other ones
	$(BIN)/python tests/fuzz --cases 200000 $(ARGS)
	$(BIN)/python tests/fuzz --what files --cases 20000 $(ARGS)

leaks: $(BUILT)  ## every C function, 100,000 calls of every kind that succeeds or is refused
	$(BIN)/python tests/leaks/calls.py --calls 100000 $(ARGS)
	$(BIN)/python tests/leaks/memory.py
	$(BIN)/python tests/leaks/modules.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict flora
	find csrc tests/native -name '*.[ch]' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/native -name '*.[ch]' | xargs $(BIN)/clang-format -i

docs: $(INSTALLED)  ## the site, in build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

demo: $(BUILT)
	$(BIN)/python -m flora finetune --output runs/demo $(ARGS)

bench: $(BUILT)  ## flora beside its peers; about twenty minutes on a quiet machine. ARGS=--help lists the options
	$(BIN)/python -m benchmarks $(ARGS)

study: $(BUILT)  ## FLoRA beside other methods on real tasks; hours. ARGS="--quick", "--part core --text-data FOLDER" …
	$(BIN)/python -m flora study $(ARGS)

# A build of its own beside the normal one. The tests run from its folder, so that it is the one they import. What Python
# itself never frees is no leak of ours, and freed memory is held only briefly, as some tests watch the process grow.
SANITIZED_PYTHON = cd $(SANITIZED)/lib && export PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib UBSAN_OPTIONS=halt_on_error=1 \
  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" && \
  $(CURDIR)/$(BIN)/python -c 'import flora._core as c; assert "$(SANITIZED)" in c.__file__, c.__file__' && \
  $(CURDIR)/$(BIN)/python

sanitize: $(SANITIZED)/.built  ## the tests of the kernels and the boundary under AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZED_PYTHON) -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	  $(addprefix $(CURDIR)/,$(SANITIZED_TESTS)) $(ARGS)

sanitize-fuzz: $(SANITIZED)/.built  ## forged arrays under both sanitizers. ARGS="--cases 200000 --seed 7"
	$(SANITIZED_PYTHON) $(CURDIR)/tests/fuzz $(ARGS)

$(SANITIZED)/.built: $(INSTALLED) $(SOURCES)
	rm -rf $(SANITIZED)
	FLORA_DEVELOP=1 FLORA_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)/objects \
	  --build-temp $(SANITIZED)/objects/here --build-lib $(SANITIZED)/lib
	touch $@

# The kernels alone, without Python: tests/native makes recorded calls again. CALLS=few is the short form.
native: native-asan native-tsan native-valgrind  ## the kernels alone under sanitizers and valgrind
cross: native-clang native-aarch64  ## the kernels alone by another compiler, and for another processor

native-asan: export UBSAN_OPTIONS = halt_on_error=1
native-asan: $(NATIVE)/$(CALLS) $(SANITIZED)/.built  ## every level, on several threads, and calls that must fail
	$(MAKE) --silent -C tests/native OUT=$(CURDIR)/$(NATIVE)/asan FLAGS="-O1 -g -fsanitize=address,undefined" \
	  EXTENSION=$(CURDIR)/$(SANITIZED)/objects/here
	$(NATIVE)/asan/replay --threads 3 --callers 2 --faults $<
	$(NATIVE)/asan/replay --threads 3 --torch $(NATIVE)/asan/libtorch_cpu.so $<

# ThreadSanitizer cannot run where addresses are drawn from a wide range.
FIXED_ADDRESSES := $(shell setarch --addr-no-randomize true 2>/dev/null && echo setarch --addr-no-randomize)

native-tsan: $(NATIVE)/$(CALLS)  ## loops on threads of OpenMP's and PyTorch's names, called by several threads at once
	$(MAKE) --silent -C tests/native OUT=$(CURDIR)/$(NATIVE)/tsan FLAGS="-O1 -g -fsanitize=thread"
	$(FIXED_ADDRESSES) $(NATIVE)/tsan/replay --threads 3 --callers 3 $<
	$(FIXED_ADDRESSES) $(NATIVE)/tsan/replay --threads 3 --callers 2 --torch $(NATIVE)/tsan/libtorch_cpu.so $<

native-valgrind: $(NATIVE)/$(CALLS)  ## the levels that valgrind knows: portable, soft-tiles, v3
	@command -v valgrind >/dev/null || { echo "valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)"; exit 1; }
	$(MAKE) --silent -C tests/native OUT=$(CURDIR)/$(NATIVE)/plain FLAGS="-O1 -g"
	valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite --show-leak-kinds=definite \
	  $(NATIVE)/plain/replay --threads 2 --faults $<

CLANG := $(shell command -v clang || command -v clang-14)

native-clang: $(NATIVE)/$(CALLS)  ## every level, compiled by clang
	$(MAKE) --silent -C tests/native CC=$(CLANG) OUT=$(CURDIR)/$(NATIVE)/clang
	$(NATIVE)/clang/replay --threads 3 --faults $<

native-aarch64: $(NATIVE)/$(CALLS)  ## portable and neon, cross-compiled and emulated
	$(MAKE) --silent -C tests/native CC=aarch64-linux-gnu-gcc OUT=$(CURDIR)/$(NATIVE)/aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(NATIVE)/aarch64/replay --threads 2 --faults $<

RECORD = $(BIN)/python tests/native/record.py $@ --golden
RECORDED := tests/native/record.py tests/test_kernels.py tests/test_golden.py

$(NATIVE)/few: $(BUILT) $(RECORDED)
	$(RECORD) --examples 3

$(NATIVE)/many: $(BUILT) $(RECORDED)
	$(RECORD) --examples 40

clean:
	rm -rf build dist runs *.egg-info $(BUILT) flora/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find flora tests benchmarks examples -name __pycache__ -prune -exec rm -r {} +

# The stamps are made last, so that an interrupted installation is taken up again; a broken environment is made anew.
$(INSTALLED): constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --requirement constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps animal-mnist==0.4  # it names TensorFlow, which its images do not need
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	FLORA_DEVELOP=1 $(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable .
	touch $@
