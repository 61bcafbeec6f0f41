# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

.PHONY: demo test lint clean

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv || (echo "python3 -m venv failed: on Debian, apt-get install python3-venv" && false)

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[demo]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@

# One thread: the network is too small for more, and the measured times do not depend on what else is running.
## Train nat_digits on real handwritten digits, evaluate it, and profile three models; everything under outputs/.
demo: .venv/demo.stamp
	OMP_NUM_THREADS=1 $(BIN)/python train/train.py --config configs/train/nat_digits.yaml --output outputs/nat_digits
	OMP_NUM_THREADS=1 $(BIN)/python tools/profile.py nat_tiny dinat_tiny swin_tiny_patch4_window7_224 --quick \
		--csv outputs/profile.csv --plot outputs/profile.png

## The whole test suite.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .

clean:
	rm -rf .venv .cache build dist outputs *.egg-info
