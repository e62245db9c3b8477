"""Files that people write: read up to a bound, and what YAML says against one in a line."""

import errno
from pathlib import Path

import yaml


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """What a file holds: never all of one that cannot be what it is taken for.

    Raises:
        OSError: it cannot be read, or has more bytes.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            # A pipe or a device has no size.
            has = f"{size:,}" if (size := path.stat().st_size) > max_bytes else f"more than {max_bytes:,}"
            raise OSError(errno.EFBIG, f"it has {has} bytes; at most {max_bytes:,} are read")
    return content


def yaml_trouble(error: Exception) -> str:
    """What YAML says, without the lines it quotes: those may hold a password."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
