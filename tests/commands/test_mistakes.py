"""A command line with several mistakes is refused with all of them at once."""

from pathlib import Path
from typing import Any

import pytest

from fastddpm import compress, evaluate, inpaint, sample
from fastddpm.errors import UsageError

CASES: list[tuple[Any, str, list[str]]] = [
    (
        sample,
        "no-run --seeds 5-1 --labels x --batch 0 --steps 0 --eta 2 --gif --animation webp --shard-size 0",
        [
            "no checkpoint at no-run; give a run directory",
            "--seeds: 5-1 runs backwards; write 1-5",
            "--labels takes numbers and ranges, as in 0-63 or 1,5,10-19; got 'x'",
            "--batch must be positive; got 0",
            "--shard-size must be positive; got 0",
            "steps must be positive; got 0",
            "eta must be in [0.0, 1.0]; got 2.0",
            "--gif and --animation webp exclude each other",
            "--gif is for up to 1,024 images in one file",
        ],
    ),
    (sample, "no-run --seeds 0-4 --labels 1,2", ["no checkpoint at no-run", "--labels gives 2 classes for 5 seeds"]),
    (
        evaluate,
        "no-run --metrics fid,fod,fud --pictures pics --batch -1 --guidance -1 --reference no.npz",
        [
            "no checkpoint at no-run",
            "--metrics takes fid, is, kid, pr, bpd, rate-distortion, ode-bpd, all or none; got 'fod', 'fud'",
            "--pictures takes progressive, ",
            "--batch must be positive; got -1",
            "guidance must be in 0..",
            "there is no file of statistics at no.npz",
        ],
    ),
    (
        inpaint,
        "no-run --seeds x --pick 3-1 --labels y --batch 0 --resamplings 0 --jump-length 0 --frames -1",
        [
            "no checkpoint at no-run",
            "--seeds takes numbers and ranges",
            "--pick: 3-1 runs backwards",
            "--labels takes numbers and ranges",
            "--batch must be positive; got 0",
            "--resamplings must be positive; got 0",
            "--jump-length must be positive; got 0",
            "--frames must be in 0..1000; got -1",
        ],
    ),
    (
        compress,
        "encode no-run digits . --count 0",
        ["no checkpoint at no-run", "--count must be positive; got 0", ". is a directory; name the file to write"],
    ),
]


@pytest.mark.parametrize(("module", "line", "expected"), CASES)
def test_all_mistakes_are_told_at_once(
    module: Any, line: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refusal:
        module.main(line.split())
    first, *problems = str(refusal.value).splitlines()
    assert first == f"{len(expected)} options cannot be used:", refusal.value
    for text in expected:
        assert sum(text in problem for problem in problems) == 1, (text, problems)
    assert list(tmp_path.iterdir()) == []
