"""Writes constraints.txt: the versions in an environment where all tests passed, exactly.

    python .ci/constraints.py ENVIRONMENT/bin/python [OLDER_PYTHON]     (or `make constraints`)

The pins hold from the Python of that environment on. An older Python, for which some of them have no wheel, gets what
pip chooses for it within them; without OLDER_PYTHON its lines stay as they are. torch stays what it is, whose builds
are gigabytes apart, unless TORCH names another.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints.txt"
BUILD = ["pip", "setuptools", "wheel", "ninja", "pybind11"]
HEAD = """\
# The tested set: every dependency of the package's extras and of the tests, exactly; the package's own ranges are open.
# Made by `make constraints` from the set that passed `make test-latest`; the Makefile gives it to every pip call.
# Lines for python_version < "{version}" are what pip chooses there, where a tested version has no wheel.
# torch's CUDA build asks for a Triton and CUDA libraries of its own, exactly; beside a CPU build the tested Triton is:
# triton=={triton}
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def installed(python):
    """{name: version} of an environment, without local suffixes such as +cpu and what torch's own build pins."""
    pins = {}
    for line in run(python, "-m", "pip", "freeze", "--all", "--exclude-editable").splitlines():
        name, _, version = line.partition("==")
        if version and not name.startswith(("nvidia-", "cuda-")):
            pins[canonical(name)] = version.split("+")[0]
    return pins


def chosen(python, pins, like):
    """{name: version} that pip would install for another Python: no newer than the pins."""
    ranges = [f"{name}<={version}" for name, version in pins.items() if name != "torch"]
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder, "report.json"), Path(folder, "limits.txt")
        limits.write_text("\n".join([*ranges, f"torch=={pins['torch']}"]))
        options = ["-q", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", report, "-c", limits]
        run(like, "-m", "pip", "--python", python, "install", *options, *BUILD, *requirements())
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        return {canonical(metadata["name"]): metadata["version"] for metadata in found}


def requirements():
    """What pyproject asks for, extras of the tests included."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["hf"], *extras["bench"], *extras["test"]]
    return [line for line in asked if not line.startswith(project["name"])]


def main():
    python, older = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    pins = installed(python)
    triton = pins.pop("triton")
    pins.pop("ivl-kernels", None)
    pins["torch"] = os.environ.get("TORCH") or re.search(r"^torch==(\S+)$", TARGET.read_text(), re.MULTILINE)[1]
    marker = f'python_version < "{version}"'
    if older:
        old = chosen(older, pins, python)
        old = {name: v.split("+")[0] for name, v in old.items() if not name.startswith(("nvidia-", "cuda-", "triton"))}
    else:
        kept = [line for line in TARGET.read_text().splitlines() if line.endswith(marker)]
        old = pins | dict(line.partition(";")[0].strip().split("==") for line in kept)
    lines = []
    for name in sorted(pins.keys() | old.keys()):
        ours, theirs = pins.get(name), old.get(name)
        if ours == theirs or theirs is None:
            lines.append(f"{name}=={ours}")
        else:
            lines += [f'{name}=={ours}; python_version >= "{version}"'] if ours else []
            lines.append(f"{name}=={theirs}; {marker}")
    TARGET.write_text(HEAD.format(version=version, triton=triton) + "\n".join(lines) + "\n")
    print(f"{TARGET.name}: {len(lines)} pins")


if __name__ == "__main__":
    main()
