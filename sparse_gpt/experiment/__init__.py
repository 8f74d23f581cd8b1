"""Experiments: grids of runs under one FLOPs budget, resumable run by run."""
