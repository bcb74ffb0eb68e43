# make demo: from nothing to a one-step student of the built-in teacher.  make test: lint, types, all tests.  make gpu: what needs a GPU.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
DISTILL := $(VENV)/bin/distill
DEMO := runs/demo
# bfloat16 where the processor computes in it; elsewhere it would take longer than float32
PRECISION := $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo bf16 || echo no)

.PHONY: demo test lint gpu

$(VENV)/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; hint: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/tools: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: $(VENV)/ready
	@if [ -f $(DEMO)/dmd/recipe.yaml ]; then $(DISTILL) dmd --resume $(DEMO)/dmd; \
	else $(DISTILL) pairs --recipe demo-pairs precision=$(PRECISION) --out $(DEMO)/pairs && \
	$(DISTILL) dmd --recipe demo-dmd precision=$(PRECISION) --pairs $(DEMO)/pairs --out $(DEMO)/dmd; fi
	$(DISTILL) sample --model $(DEMO)/dmd --num 200 --seed 1 --grid --out $(DEMO)/samples
	@echo
	@echo "made: a student that needs one network evaluation for an image, its teacher 35: $(DEMO)/dmd/student"
	@echo "teacher and student from the same noise: $(CURDIR)/$(DEMO)/dmd/comparison.png"
	@echo "more of the student:                     $(CURDIR)/$(DEMO)/samples/grid.png"
	@echo "next: measure both:    $(DISTILL) evaluate --model digits --model $(DEMO)/dmd --num 700 --out $(DEMO)/evaluation"
	@echo "      sevens:          $(DISTILL) sample --model $(DEMO)/dmd --classes 7 --num 100 --grid --out $(DEMO)/sevens"
	@echo "      how it learned:  $(DISTILL) watch $(DEMO)/dmd"
	@echo "      your own pictures, Stable Diffusion, text: README.md"

lint: $(VENV)/tools
	$(VENV)/bin/ruff check distill_cli tests docs
	$(VENV)/bin/ruff format --check distill_cli tests docs
	$(VENV)/bin/mypy

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup

gpu: $(VENV)/ready
	PYTHON=$(VENV)/bin/python sh docs/gpu.sh
