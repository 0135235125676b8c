import json
import re

import pytest

from grafting import UserError
from grafting.report import write_report


def run_folder(path, **metrics):
    path.mkdir()
    (path / "config.yaml").write_text("name: '<script>alert(1)</script>'\n")
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


STAGES = {
    "host": {"fid": 10.0, "denoising_loss": 0.1},
    "fresh": {"fid": 110.0, "denoising_loss": 0.3},
    "finetuned": {"fid": 15.0, "denoising_loss": 0.15, "denoising_loss_change_interval": [-0.002, 0.0523]},
}


def test_the_closed_gap_is_in_the_table_and_nothing_is_fetched(tmp_path):
    html = write_report(run_folder(tmp_path / "run", stages=STAGES)).read_text()
    text = re.sub(r"<[^>]+>", " ", html)
    assert re.search(r"\b95(\.0)?\s?%", text)  # (110 − 15) / (110 − 10)
    assert re.search(r"\b75(\.0)?\s?%", text)  # (0.3 − 0.15) / (0.3 − 0.1)
    assert re.search(r"[−-]0\.002(00)? to \+0\.0523", text)
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html)
    assert "<script>alert(1)" not in html


def test_damaged_metrics_are_one_line(tmp_path):
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
