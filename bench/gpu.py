"""The measurement on a GPU: `python -m bench.gpu`, on a machine that need have torch and transformers only.

What else it needs it takes from a folder of wheels (`python -m bench.gpu_wheels`), into a temporary folder that goes
with it. This module itself imports the standard library alone; the measuring is in `bench.gpu_measure`.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "bench" / "wheels"
RESULT = ROOT / "bench" / "results" / "gpu.json"
WITH_WHEELS = "MODERATO_BENCH_WITH_WHEELS"
HERE_ALREADY = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument(
        "--quick", action="store_true", help="a tiny model and few comments: whether all of it works"
    )
    arguments.add_argument("--only", choices=("engine", "system"), help="one half of it")
    arguments.add_argument("--wheels", type=Path, default=WHEELS, help=f"by default {WHEELS}")
    arguments.add_argument("--out", type=Path, default=RESULT, help=f"the figures as JSON; by default {RESULT}")
    options = arguments.parse_args()
    check_python()
    try:
        from bench.gpu_measure import run
    except ModuleNotFoundError as error:
        if WITH_WHEELS in os.environ:
            raise
        raise SystemExit(run_with_wheels("bench.gpu", options.wheels.resolve(), str(error.name))) from None
    raise SystemExit(run(options.device, quick=options.quick, only=options.only, result=options.out))


def check_python() -> None:
    """See to it that this Python has what no wheels are kept for."""
    if missing := [name for name in HERE_ALREADY if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"this Python ({sys.executable}) has no {', '.join(missing)}; no wheels are kept for them")


def run_with_wheels(module: str, wheels: Path, missing: str) -> int:
    """The same command of this module once more, with the wheels installed where only it and its children look.

    Returns:
        Its exit status.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(
            f"this Python ({sys.executable}) has no {missing}, and {wheels} holds no wheels: on a machine with a "
            "package registry run `python -m bench.gpu_wheels FOLDER`, and give that folder to --wheels"
        )
    with tempfile.TemporaryDirectory(prefix="moderato-site-") as site:
        # PostgreSQL does not run as root: the user it runs as must reach its programs.
        Path(site).chmod(0o755)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--disable-pip-version-check", "--target", site, *files], check=True)
        paths = [site, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), WITH_WHEELS: "1"}
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    main()
