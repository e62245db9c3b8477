"""Measures moderato on one machine, beside the engine alone and beside what else one could run: `python -m bench`."""
