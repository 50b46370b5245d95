# make demo and make test do the whole set-up from a fresh clone: everything lands in .venv and in the
# user cache ($XDG_CACHE_HOME or ~/.cache, then sparsemm-edge/). Running them again does only what is new.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check
DEMO_MODEL := sparsemm_edge/demo_model/.made-from

.PHONY: setup setup-dev demo test lint sanitize wheel clean

setup: $(VENV)/.package $(DEMO_MODEL)
setup-dev: $(VENV)/.dev

demo: setup
	$(VENV)/bin/sparsemm-edge demo --out build/demo

# one process a core, whole files at a time
test: $(VENV)/.tools lint $(DEMO_MODEL)
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The tests of the cache on a llama.cpp with AddressSanitizer and UBSan: builds for some 15 minutes
SANITIZE := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=ON \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_SANITIZE_ADDRESS=ON \
	-DLLAMA_SANITIZE_UNDEFINED=ON -DGGML_SANITIZE_ADDRESS=ON -DGGML_SANITIZE_UNDEFINED=ON
sanitize: $(VENV)/.dev
	$(PIP) cmake ninja
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -G Ninja -B build/sanitize $(SANITIZE) \
		-S "$$($(PY) scripts/build_llama_cpp_python.py source)/vendor/llama.cpp"
	$(VENV)/bin/ninja -C build/sanitize llama mtmd test-llama-archs
	ASAN_OPTIONS=detect_leaks=0 build/sanitize/bin/test-llama-archs
	LLAMA_CPP_LIB_PATH=build/sanitize/bin MTMD_CPP_LIB=build/sanitize/bin ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(PY) -m pytest tests/llama/test_eviction.py tests/llama/test_prompt_end.py tests/llama/test_max_tail.py \
		tests/llama/test_conversation.py
	source="$$($(PY) scripts/build_llama_cpp_python.py source)/vendor/llama.cpp"; \
	g++ -g -std=c++17 -fsanitize=address,undefined -I"$$source/include" -I"$$source/ggml/include" \
		tests/helpers/leak_check.cpp -Lbuild/sanitize/bin -lllama -lggml -lggml-base \
		-Wl,-rpath,"$(CURDIR)/build/sanitize/bin" -Wl,-rpath-link,build/sanitize/bin -o build/sanitize/leak_check
	ASAN_OPTIONS=detect_leaks=1 build/sanitize/leak_check \
		"$$(PYTHONPATH=tests:scripts $(PY) -c 'from helpers.models import test_model; print(test_model("llava").gguf("f16"))')"

# Wheels for other machines of this system, in dist/: pip install dist/*.whl. Portable, unlike the one in .venv
wheel: $(DEMO_MODEL)
	$(PY) scripts/build_llama_cpp_python.py dist dist
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(dir $(DEMO_MODEL)) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is missing or older than 3.10: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# llama-cpp-python with this project's patches: built once a machine, minutes, then from the cache
$(VENV)/.llama: $(VENV)/.python scripts/build_llama_cpp_python.py patches/pin.json $(wildcard patches/*.patch)
	$(PY) scripts/build_llama_cpp_python.py install
	touch $@

# llama-server and the like, and the libllama without the patches, for the tests. The wheel comes out of the
# same build: make test begins with this
$(VENV)/.tools: $(VENV)/.python scripts/build_llama_cpp_python.py patches/pin.json $(wildcard patches/*.patch)
	$(PY) scripts/build_llama_cpp_python.py tools
	$(PY) scripts/build_llama_cpp_python.py stock
	touch $@

$(VENV)/.package: $(VENV)/.llama pyproject.toml
	$(PIP) --editable .
	touch $@

# The demo model's GGUF files, from its checkpoint, with gguf-py and numpy: no torch
$(DEMO_MODEL): $(VENV)/.package scripts/make_demo_gguf.py $(wildcard models/demo/* scores/demo.json)
	$(PY) scripts/make_demo_gguf.py
	touch $@

# torch first and by itself, so that nothing else chooses its version
$(VENV)/.torch: $(VENV)/.python
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.dev: $(VENV)/.package $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@
