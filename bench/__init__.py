"""Measures moderato on one machine, beside the engine alone and beside what else one could run: `python -m bench`."""

import model  # noqa: F401  # first of all, as it keeps libraries from sending anything to their makers
