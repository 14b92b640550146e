"""`python -m benchmarks.frozen_products`: the table, and a file with every figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import frozen_products


def test_a_row_and_every_figure_of_each_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_products, "SHAPES", {"small": (8, 4, 2, 5), "smaller": (4, 4, 1, 2)})
    monkeypatch.setattr(frozen_products, "machine_conditions", lambda packages: {"packages": packages})
    before = torch.get_num_threads()
    frozen_products.main(["--rounds", "7", "--json", str(tmp_path / "f.json")])
    assert torch.get_num_threads() == before == 1
    record = json.loads((tmp_path / "f.json").read_text())
    assert (record["rounds"], record["dtype"], record["conditions"]) == (7, "float32", {"packages": ["torch"]})
    small = record["results"][0]
    assert (small["gflops"], small["stacked_weights_mb"]) == (2 * 5 * 8 * 16 / 1e9, 4 * 8 * 16 / 1e6)
    assert {kind: len(values) for kind, values in small["ms"].items()} == {"one_a_layer": 7, "one_for_all": 7}
    assert small["ratio_interval"][0] <= small["ratio"] <= small["ratio_interval"][1]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["small", "smaller"]
    assert rows[2][5] == f"{small['ratio']:.2f}x"
