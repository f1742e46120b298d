"""Small data sets as people have them, each with what is right; a script outside the repository writes them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastddpm.data import open_dataset
from fastddpm.errors import DataError, UsageError

SCRIPT = Path(__file__).parents[3] / "shared" / "cases" / "make_cases.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason=f"there is no {SCRIPT.name} beside this checkout")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, str(SCRIPT), str(root)], check=True)
    return root


def test_every_case_is_read_right_or_refused(cases: Path, tmp_path: Path) -> None:
    expected: dict[str, dict[str, Any]] = json.loads((cases / "expected.json").read_text())
    assert len(expected) >= 7
    for name, right in expected.items():
        said: list[str] = []

        def opened(split: Any, name: str = name, said: list[str] = said) -> Any:
            return open_dataset(
                cases / name, image_size=16, channels=3, split=split, cache=tmp_path / "cache", report=said.append
            )

        if "refuse" in right:
            # Refused with these words, or read: links are followed, and TIFF is read where Pillow does.
            try:
                assert len(opened("train").images) == {"links": 12, "tiff": 4}[name]
            except (UsageError, DataError) as error:
                assert all(word in str(error) for word in right["refuse"]), (name, error)
            continue
        for split in ("train", "test"):
            if split in right:
                dataset = opened(split)
                assert len(dataset.images) == right[split], (name, split)
                if "classes" in right:
                    assert list(dataset.classes) == right["classes"], name
                if "labels" in right:
                    np.testing.assert_array_equal(dataset.labels, right["labels"])
            else:
                with pytest.raises((UsageError, DataError), match="test"):
                    opened(split)
        if "note" in right:
            assert any(right["note"] in line for line in said), (name, said)
