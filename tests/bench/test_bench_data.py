"""The data bench measures what it reports."""

from pathlib import Path

import pytest

from var_scale.bench import data as bench
from var_scale.files import read_json


def test_bench_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short rounds of the real bench: the file and the terminal have the rates, the ratio of the
    two ways, and how far they differ."""
    monkeypatch.setattr(bench, "COUNT", 8)
    monkeypatch.setattr(bench, "TOKENS", 4096)
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    result = bench.bench_data(tmp_path / "out.json")
    assert result["ratio"] == pytest.approx(
        result["images_per_second"]["torch"] / result["images_per_second"]["pillow"]
    )
    assert (
        result["largest_difference"] <= 2
        and 0 < result["share_different"] < 0.05
        and result["tokens_samples_per_second"] > 1000
    )
    assert (
        read_json(tmp_path / "out.json")["ratio"] == result["ratio"]
        and "images/s" in capsys.readouterr().out
    )
