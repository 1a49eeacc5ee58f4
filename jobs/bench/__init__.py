"""Benchmarks of the kernels: `flamingo bench`; docs/benchmarks.md is the page.

Imports torch and the standard library (the whole layer and the step need megatron-core, the plot matplotlib, and are
left out with a line where these are missing), so that it runs on a GPU machine that holds little more than torch:
`python -m jobs.bench` there.
"""
