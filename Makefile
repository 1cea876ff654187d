# THE two commands: `make demo` and `make test`. Each sets up everything by itself (infra/bootstrap.py; also callable without make).
# Arguments go on with ARGS: make test ARGS="-k shard -x"
PYTHON ?= python3
BOOTSTRAP = $(PYTHON) infra/bootstrap.py

.PHONY: help setup demo test quick lint long accept bench chaos histories clean
help:
	@echo "make demo    set up, then generated images -> shards -> VAE -> latent table, in about a minute"
	@echo "make test    set up, then lint and all tests but the long ones"
	@echo "make quick   set up, then the tests that show most faults, in 90 s"
	@echo "make lint    ruff, ruff format, mypy"
	@echo "make long    tests of many cases of which make test runs few"
	@echo "make accept  full-size acceptance on real data (AECORE_DATA; long)"
	@echo "make bench   benchmarks (tests/benchmarks/README.md)"
	@echo "make chaos   commands under random faults (ARGS=\"seconds=600 seed=7 store=local|s3\")"
	@echo "make histories  sources that change and what follows them (ARGS=\"count=500 seed=1 store=local|s3\")"
	@echo "make setup   only the set-up of .venv"
	@echo "make clean   remove the demo's output and caches (not .venv)"

setup demo test quick lint long accept bench chaos histories:
	@$(BOOTSTRAP) $@ $(ARGS)

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find aecore pipelines tests infra -name __pycache__ -type d -prune -exec rm -rf {} +
