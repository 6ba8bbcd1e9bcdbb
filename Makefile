# Everything runs in .venv, whatever environment the calling shell has active.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PORT   ?= 8000
RUN    ?= book/results/mnist-2-softplus-crt-long.safetensors
RUNS   ?= $(RUN)
REQUIREMENTS ?= requirements.txt
# An index that pip prefers where it has a build of torch: that of the CPU, say. Empty: none.
INDEX ?=
SEED ?= 0
FLOOR  := _build/floor
PAGE   := $(CURDIR)/_build/html/index.html

# How chapters are tested, and which tests are about the package alone, without a browser.
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
	--nbval-sanitize-with tests/notebooks/sanitize.cfg
# The tests of a file, or of a chapter, stay together in a process.
PARALLEL := --numprocesses auto --dist loadfile
PACKAGE_TESTS := $(filter-out $(patsubst %,tests/test_%.py,book jupyterlab kernels pages pdf), \
	$(wildcard tests/test_*.py))
CHAPTER_TESTS := $(patsubst %,tests/test_%.py,demos explorer plots widgets)
PACKAGE_TOOLS := hypothesis|ipykernel|mpmath|nbval|pytest

# What a page is made of: a change to any of these rebuilds the book.
SOURCES := _config.yml _toc.yml $(shell find book crcbook tools -type f \
	-not -path '*/__pycache__/*' -not -path '*/.*')

export PYTHONNOUSERSITE := 1
# The networks here are small: a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1
unexport PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install book serve lab pdf pictures check test explore test-floor test-newest links lint record bench \
	answers memory tightness soundness proofs clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## create .venv and install the pinned requirements (INDEX=)

book: _build/.built  ## execute every chapter and build the HTML; a warning is an error
	@echo "The book is built. Open $(PAGE)"

serve: book  ## serve the built book on localhost (PORT=8000)
	@$(PYTHON) tools/serve.py $(PORT)

lab: install  ## open the chapters in JupyterLab, to change their code and move their live widgets
	$(VENV)/bin/jupyter-lab book

pdf: book  ## print the book to _build/html/crcbook.pdf
	$(PYTHON) tools/pdf.py

pictures: book  ## draw the pictures in book/ anew, from the built book
	$(PYTHON) tools/pictures.py

check: export HYPOTHESIS_PROFILE := check
check: install  ## test what a change to the package may break, in two minutes: no book, no browser
	$(PYTHON) -m pytest $(filter-out $(CHAPTER_TESTS),$(PACKAGE_TESTS)) -m "not slow" $(PARALLEL)

# A book that does not build fails this target, but does not keep the tests from saying why.
test: lint  ## check the style, test the package, every chapter and every built page
	@built=0; $(MAKE) --no-print-directory book || built=1; \
	$(PYTHON) -m pytest tests book $(NBVAL) $(PARALLEL) && exit $$built

explore: export HYPOTHESIS_PROFILE := explore
explore: install  ## try the properties of the package on new examples, other ones at every run
	$(PYTHON) -m pytest $(PACKAGE_TESTS) -m hypothesis $(PARALLEL)

test-floor: install  ## test the package and a chapter with the lowest versions pyproject.toml allows
	$(PYTHON) -m uv venv --quiet --clear --python $(VENV)/bin/python $(FLOOR)
	$(PYTHON) -m uv pip install --python $(FLOOR) --resolution lowest-direct \
		--editable ".[book,experiments]"
	$(PYTHON) -m uv pip install --python $(FLOOR) \
		$$(grep -E "^($(PACKAGE_TOOLS))==" requirements.txt)
	$(FLOOR)/bin/python -m pytest $(PACKAGE_TESTS)
	$(FLOOR)/bin/python -m pytest book/the_hessian_eigenvalue_theorem.ipynb $(NBVAL)

# requirements.txt without its pins; Jupyter Book 2 is another program, and a new linter is no news.
test-newest:  ## build and test the book with the newest version of everything it names
	mkdir -p _build
	sed -e '/^# What these import/,$$d' -e 's/^jupyter-book==.*/jupyter-book<2/' \
		-e '/^\(ruff\|mypy\)==/!s/==.*//' \
		requirements.txt > _build/newest.txt
	$(MAKE) test VENV=_build/newest REQUIREMENTS=_build/newest.txt

links: book  ## check every link that leads out of the book
	$(VENV)/bin/jupyter-book build . --builder linkcheck

lint: install  ## check style, formatting and types, notebooks included
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

record: install  ## execute the chapters and record the outputs that the tests check
	$(PYTHON) tests/notebooks/record.py book/*.ipynb

bench: export OMP_NUM_THREADS := $(shell nproc)
bench: install  ## time the certificates against the published schedule (RUN=runs/m2)
	$(PYTHON) benchmarks/speed.py $(RUN)

tightness: export OMP_NUM_THREADS := $(shell nproc)
tightness: install  ## measure how close certificates come to the best attack (RUNS="runs/a runs/b")
	$(PYTHON) benchmarks/tightness.py $(RUNS)

answers: book  ## time how fast the figures answer: within 100 ms
	$(PYTHON) benchmarks/answers.py

memory: install  ## measure each chapter's memory on one core: Binder gives 2 GB
	$(PYTHON) benchmarks/memory.py

soundness: install  ## attack 100,000 certificates and count the broken ones: none may be (SEED=0)
	$(PYTHON) benchmarks/soundness.py --seed $(SEED)

proofs: install  ## prove 200 MNIST test images and have the independent checker decide (SEED=0)
	$(PYTHON) benchmarks/proofs.py $(RUN) --images 200 --seed $(SEED) --runs _build/proofs

clean:  ## remove the built book and caches; .venv and runs stay
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find benchmarks book crcbook tests tools -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { $(create_venv); }
	$(PYTHON) -m pip install --disable-pip-version-check --requirement $(REQUIREMENTS) \
		$(if $(INDEX),--extra-index-url $(INDEX))
	$(PYTHON) -m pip install --disable-pip-version-check --no-deps --no-build-isolation \
		--quiet --editable .
	@touch $@

_build/.built: $(VENV)/.installed $(SOURCES)
	@rm -rf _build/html _build/.doctrees _build/jupyter_execute $@
	$(VENV)/bin/jupyter-book build . -n -W --keep-going
	@touch $@

# The first Python from 3.11 to 3.13 whose venv module is whole.
define create_venv
for python in python3 python3.13 python3.12 python3.11; do \
	version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
		|| continue; \
	case $$version in 3.11|3.12|3.13) ;; *) other=$${other:-$$version}; continue ;; esac; \
	if $$python -c 'import ensurepip, venv' 2>/dev/null; \
	then echo "Creating $(VENV) with Python $$version"; exec $$python -m venv --clear $(VENV); \
	else incomplete=$${incomplete:-$$version}; fi; \
done; \
if [ -n "$$incomplete" ]; \
then echo "Python $$incomplete lacks its venv module. On Debian and Ubuntu:" \
	"apt install python$$incomplete-venv" >&2; \
elif [ -n "$$other" ]; \
then echo "A Python from 3.11 to 3.13 is needed; found was $$other. Another beside it does no harm:" \
	"your package manager, pyenv or uv brings one" >&2; \
else echo "No Python from 3.11 to 3.13 was found. On Debian and Ubuntu:" \
	"apt install python3 python3-venv" >&2; fi; \
exit 1
endef
