# The stages of CI by name. Each makes the environment that it needs; `make ci` is all of them, as CI runs them.

.PHONY: help test lint coverage compiled wheel cluster real-vllm families speed ci tables

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14

test:  ## lint and all tests that need neither vLLM nor a GPU, about 10 minutes
	tests/run

lint:  ## style, spelling, types
	tests/lint

coverage:  ## the tests once more, with the lines and branches that none of them runs
	tests/run -n 2 --cov --cov-report=term

compiled:  ## the tests of the hot path again, compiled to C, and both wheels
	tests/compiled

wheel:  ## a pure and a compiled wheel in dist/
	tools/wheels

cluster:  ## the service on Ray clusters of this machine, with simulated engines; installs Ray
	tests/cluster_ray

real-vllm:  ## real vLLM engines on the CPU; installs 2.5 GB a version
	tests/real_vllm

families:  ## real vLLM engines with a tiny model of each supported family, 3 minutes each; then `make tables`
	KV_FAMILIES=all KV_RECORD=docs/kv-families.json tests/real_vllm 0.32.0 tests/kv_real/test_families.py tests/kv_real/test_pair.py

speed:  ## CPU time of the proxy against a reference, about a minute
	tests/speed

ci:  ## everything above
	.ci/run

tables:  ## write what is made from tables and records: docs/settings.md, docs/connector.md, completions, man page
	.venv/bin/python -m tools.generate
