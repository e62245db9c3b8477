"""What learns. First it switches off, as `model` does, what libraries would send to their makers."""

import model  # noqa: F401
