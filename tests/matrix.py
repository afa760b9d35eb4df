"""Every supported upstream, each in an environment of its own under .venv-matrix.

    python tests/matrix.py [NAME ...]    all, or those named (such as transformers-5.16, torch-2.11, triton-3.6)
    python tests/matrix.py --ends        integration tests on the oldest transformers and on the newest that pip sees
    python tests/matrix.py --table       the feature table alone, without the tests

The environment that runs this is the base: the others see its packages through a .pth file and hold only what differs.
What ran is kept in tests/matrix.json, an entry an environment; what could not be installed is an entry that says so.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-matrix"
RESULTS = ROOT / "tests" / "matrix.json"
VERSIONS = {
    "transformers": ("4.57.6", "5.0.0", "5.5", "5.10", "5.16", "5.20", "5.23", "5.24", "newest"),
    "torch": ("2.10", "2.11", "2.12", "2.13", "2.14"),
    "triton": ("3.6", "3.7", "3.8", "3.9"),
}
NOT_GPU = "not gpu and not aot and not triton and not cuda and not far_apart and not spill and not liger"
TESTS = {
    "transformers": ("tests/integrations", "tests/models"),
    "torch": ("tests/ops", "tests/nn", "-k", NOT_GPU),
    "triton": ("tests/ops", "tests/nn", "-k", f"not ({NOT_GPU})"),
}


def newest():
    """The newest transformers within the package's range that pip sees."""
    text = pip(sys.executable, "index", "versions", "transformers").stdout
    found = re.search(r"Available versions: (.*)", text)
    if not found:
        raise SystemExit(f"pip does not list transformers:\n{text}")
    return next(version for version in found[1].split(", ") if version.split(".")[0] in ("4", "5"))


def pip(python, *arguments):
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def satisfies(package, wanted):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        have = importlib.metadata.version(package).split("+")[0]
        return have == wanted or have.startswith(f"{wanted}.")
    return False


def environment(package, wanted):
    """(python of the environment, "") or (None, why it could not be made); the base itself where it fits."""
    if satisfies(package, wanted):
        return sys.executable, ""
    folder = HOME / f"{package}-{wanted}"
    stamp, spec = folder / "spec", f"{package}=={wanted}" + ("" if wanted.count(".") == 2 else ".*")
    told = f"{spec} over {sys.prefix}, Python {sys.version}"
    if not stamp.exists() or stamp.read_text() != told:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        site = next(folder.glob("lib*/python*/site-packages"), folder / "Lib" / "site-packages")
        (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not stamp.exists():
        made = pip(python, "install", "-q", spec)
        if made.returncode:
            return None, (made.stdout.strip().splitlines() or ["pip failed"])[-1]
        stamp.write_text(told)
    return python, ""


def run(python, *arguments):
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [str(python), *arguments], cwd=ROOT, env={**os.environ, **quiet}, text=True, stdout=subprocess.PIPE
    )


def versions(python):
    code = (
        "import importlib.metadata as m, json\n"
        "names = ('transformers', 'torch', 'triton', 'tokenizers', 'huggingface_hub')\n"
        "print(json.dumps({n: m.version(n) for n in names if any(True for _ in m.distributions(name=n))}))"
    )
    return json.loads(run(python, "-c", code).stdout)


def tests(python, package):
    """Counts of a pytest run, and the names of what failed."""
    start = time.monotonic()
    options = (
        ["-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow"]
        if package == "transformers"
        else ["-q", "-n", "2"]
    )
    done = run(python, "-m", "pytest", *options, *TESTS[package])
    print(done.stdout[-3000:], flush=True)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed|xpassed)", done.stdout)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {**counts, "exit": done.returncode, "seconds": round(time.monotonic() - start), "names": failed}


def table(python):
    done = run(python, "-m", "tests.feature_table")
    if done.returncode:
        return {"error": f"exit {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])["cells"]


def wrong(entry):
    """What is not as it must be in an entry."""
    cells = [(m, f, text) for m, row in entry.get("cells", {}).items() for f, text in row.items()]
    found = [f"{model}, {feature}: {text}" for model, feature, text in cells if text.startswith(("WRONG", "raises"))]
    return found + entry.get("tests", {}).get("names", [])


def tested():
    """The versions of transformers in the table."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {entry.get("versions", {}).get("transformers") for entry in known.values()}


def keep(name, entry):
    """Adds to what is known of an environment; another version of anything in it makes a new entry."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    before = known.get(name, {})
    if before.get("versions") == entry.get("versions"):
        entry = {**before, **entry}
    known[name] = entry
    order = [f"{package}-{version}" for package, wanted in VERSIONS.items() for version in wanted]
    known = {key: known[key] for key in sorted(known, key=lambda k: order.index(k) if k in order else len(order))}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ends", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    last, bad = newest(), []
    for package, wanted in VERSIONS.items():
        for version in wanted:
            name = f"{package}-{version}"
            if options.names and name not in options.names or options.table and package != "transformers":
                continue
            if options.ends and (package != "transformers" or version not in (wanted[0], "newest")):
                continue
            exact = last if version == "newest" else version
            listed = any(exact == known or exact.startswith(f"{known}.") for known in wanted if known != version)
            if version == "newest" and listed and not options.ends:
                continue  # it has its column
            if options.ends and satisfies(package, exact):
                print(f"{name}: {package} {exact} is what the tests before this ran on", flush=True)
                continue
            python, why = environment(package, exact)
            if python is None:
                print(f"{name}: NOT RUN: {why}", flush=True)
                bad += [f"{name}: not run: {why}"] if options.ends else []
                if not options.ends:
                    keep(name, {"not run": why})
                continue
            entry = {"versions": versions(python)}
            print(f"{name}: {entry['versions']}", flush=True)
            if package == "transformers" and not options.ends:
                entry["cells"] = table(python)
            if not options.table:
                entry["tests"] = tests(python, package)
                if entry["tests"]["exit"]:
                    bad.append(f"{name}: tests exit with {entry['tests']['exit']}")
            if not options.ends:
                keep(name, entry)
            bad += [f"{name}: {text}" for text in wrong(entry)]
            if options.ends and version == "newest" and exact not in tested():
                # A release that came out since: whoever works on something else is told, not stopped.
                print("\n".join(["NEWER THAN ANY TESTED:", *bad]), flush=True)
                bad = [text for text in bad if not text.startswith(name)]
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
