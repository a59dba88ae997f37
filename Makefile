# Every target sets up .venv first: once, and again when the sources of the package's build change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the newest set that the package is tested with; the package itself runs on torch 2.11 and newer
TORCH := torch==2.14.1 torchvision==0.29.1
# SYSTEM=1 fetches nothing and makes no .venv: the package is built into the environment that PYTHON belongs to, which has
# torch, torchvision, rich, matplotlib and pytest already (a GPU machine without a network: make gpu SYSTEM=1)
ifdef SYSTEM
VENV := build/system
BIN := $(patsubst %/,%,$(dir $(shell command -v $(PYTHON))))
endif

# an environment that keeps Python from keeping what it has compiled has every test's process compile all of the sources again
unexport PYTHONDONTWRITEBYTECODE

# in front of what takes minutes without a word: a line every ten seconds
PATIENTLY = @patiently() { \
		"$$@" & job=$$!; s=0; \
		while kill -0 $$job 2>/dev/null; do sleep 1; s=$$((s + 1)); [ $$((s % 10)) -ne 0 ] || echo "... $$s s"; done; \
		wait $$job; \
	}; patiently

.PHONY: demo test lint docs bench studies gpu sanitize arm wheel clean

demo: $(VENV)/installed
	$(BIN)/python -m bench.demo --out demo

# the script pytest, not python -m pytest, which would put the checkout's kernels/ on the path; worksteal: what a file sets up once is set
# up by one worker, and neither waits for the other at the end
test: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc examples tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml

# the reference of the public API, from the docstrings: build/docs/index.html
docs: $(VENV)/installed
	$(BIN)/python docs/reference.py build/docs

# the tests of the extension, and of the CUDA C++ kernels on the host, under the compiler's checks, in builds of their own.
# AddressSanitizer and UndefinedBehaviorSanitizer: but for the tests that limit a process's memory, which the sanitizer's own map does not
# fit into. ThreadSanitizer: the kernels on threads that it can follow, without torch; that a race of two callers is found; and threads of
# Python's around models, without OpenMP's inside, which it cannot follow. Address space is not randomised there (setarch): older runtimes
# of its cannot place their map otherwise.
SANITIZED := build/sanitized
THREADED := build/threaded
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
WATCHED := TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1" setarch -R
sanitize: $(VENV)/installed
	FUSEDRES_BUILD=cpu FUSEDRES_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib PYTHONSAFEPATH=1 LD_PRELOAD="$(RUNTIMES)" \
		ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -n 2 -k "not memory" --backend cpp tests/backends/test_cpp.py tests/backends/test_cpp_extension.py tests/backends/test_cpp_winograd.py \
		tests/backends/test_contract.py tests/backends/test_contract_edges.py tests/backends/test_tape.py \
		tests/backends/test_tape_launches.py::test_convolutions_of_the_library_stand_between_launches \
		tests/backends/test_tape_launches.py::test_a_refused_launch_raises tests/blocks/test_unchanged.py tests/test_threads.py tests/test_prepack.py
	FUSEDRES_SANITIZE=address,undefined PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib PYTHONSAFEPATH=1 LD_PRELOAD="$(RUNTIMES)" \
		ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -n 2 --backend cuda_host tests/backends/test_contract.py tests/backends/test_contract_edges.py
	FUSEDRES_BUILD=cpu FUSEDRES_SANITIZE=thread $(BIN)/python setup.py -q build --build-base $(THREADED) --build-lib $(THREADED)/lib
	$(CXX) -std=c++20 -O1 -g1 -fsanitize=thread -pthread -Icsrc tests/backends/threads.cpp \
		$$(find $(THREADED) -path '*/csrc/cpu/*.o' -not -name '*_binding.o') -o $(THREADED)/threads
	$(WATCHED) $(THREADED)/threads
	$(WATCHED) $(THREADED)/threads race > $(THREADED)/race.log 2>&1; test $$? -eq 66
	PYTHONPATH=$(CURDIR)/$(THREADED)/lib PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 LD_PRELOAD="$(shell $(CXX) -print-file-name=libtsan.so)" \
		$(WATCHED) $(BIN)/pytest -n 0 -k one-inside tests/test_threads.py

# the kernels for ARM (NEON), without torch, on an emulated processor: the bits of one thread, and the numbers of this processor's portable
# kernels, of which the tests say how right they are; apt-get install g++-aarch64-linux-gnu qemu-user
ALONE = -std=c++20 -O2 -Werror=switch -pthread -static -Icsrc tests/backends/threads.cpp \
	$(shell find csrc/cpu -name '*.cpp' -not -name '*_binding.cpp')
arm:
	mkdir -p build/arm
	$(CXX) $(ALONE) -o build/arm/here
	aarch64-linux-gnu-g++ $(ALONE) -o build/arm/threads
	build/arm/here write build/arm/expected
	qemu-aarch64 build/arm/threads compare build/arm/expected

# one wheel for Python 3.10 and torch 2.11 and everything newer, in dist/; its tag says from which glibc on
wheel: $(VENV)/installed
	rm -rf build/wheel build/lib.*
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl

bench: $(VENV)/peers
	$(BIN)/python -m bench.models --json results/models.json --contenders eager compile compile-freezing openvino onnxruntime \
		fused fused-prepacked fused+compile fused-recompute memory_efficient
	$(BIN)/python -m bench.models --json results/models-bfloat16.json --dtype bfloat16 --contenders eager fused fused-prepacked
	$(BIN)/python -m bench.models --json results/models-avx2.json --capability avx2 --contenders eager fused fused-prepacked
	$(BIN)/python -m bench.models --json results/models-batch1.json --modes infer --batch 1 --resolution 224 \
		--contenders eager compile-freezing openvino onnxruntime fused fused-prepacked
	$(BIN)/python -m bench.report results/models.json results/models-avx2.json results/models-bfloat16.json results/models-batch1.json --out results

# why skip connections work: the papers' claims on the fused blocks, seven to ten minutes on two cores; results/studies
studies: $(VENV)/installed
	$(BIN)/python -m bench.studies $(STUDIES)

# everything that needs a GPU, in nine minutes; GPU_FLAGS=--dry-run rehearses it at toy size on the CPU
gpu: $(VENV)/installed
	$(BIN)/python -m bench.gpu --out results/gpu $(GPU_FLAGS)

$(VENV)/installed: Makefile pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
ifdef SYSTEM
	mkdir -p $(VENV)
	$(BIN)/python -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
else
	@echo "setting up $(VENV), once: 1 of 3, the environment"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "2 of 3: PyTorch and what builds the extension, a minute or two of downloads"
	$(PATIENTLY) $(BIN)/pip install --quiet $(TORCH) "setuptools>=77,<82" wheel ninja
	@echo "3 of 3: the C++ kernels, compiled for every instruction set, a minute or two; tools for tests and benchmarks"
	$(PATIENTLY) $(BIN)/pip install --quiet --no-build-isolation -e ".[dev,bench]"
endif
	touch $@

# other people's engines, which bench.models sets beside ours
$(VENV)/peers: $(VENV)/installed
	$(PATIENTLY) $(BIN)/pip install --quiet --no-build-isolation -e ".[bench-peers]"
	touch $@

clean:
	rm -rf $(VENV) build demo dist trial *.egg-info fusedres/*.so .benchmarks .hypothesis .pytest_cache .ruff_cache
