"""``python -m softcl.report``: a page that stands alone, whatever state its runs are in."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest

from softcl.report import main
from softcl.reporting.runs import read_runs, short_names
from softcl.train.__main__ import main as train

FIGURES = {"loss", "knn", "lr", "teacher", "purity", "spread", "speed"}


def pictures(page: str) -> list[bytes]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [base64.b64decode(data) for data in found]


def test_two_runs_are_compared_on_one_page(flags: list[str], tmp_path: Path, capsys):
    from PIL import Image

    assert train([*flags, "--out", "a", "--knn-every", "1"]) == 0
    assert train([*flags, "--out", "b", "--lr", "0.01", "--max-steps", "5"]) == 0
    capsys.readouterr()
    assert main(["a", "b", "--map", "pca"]) == 0
    assert "written    report/index.html" in capsys.readouterr().out
    names = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert names == FIGURES | {"map-a", "map-b", "neighbors-a"}  # b has no end yet
    page = (tmp_path / "report/index.html").read_text()
    assert "<script" not in page and "http" not in page  # nothing is fetched
    inside = pictures(page)
    assert len(inside) == len(names)
    stored = {path.read_bytes() for path in (tmp_path / "report").glob("*.png")}
    assert set(inside) == stored
    for png in inside:
        with Image.open(io.BytesIO(png)) as image:
            image.load()
            assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert '<tr class="differs"><td>lr</td><td>0.05</td><td>0.01</td></tr>' in page
    assert page.count('class="differs"') == 3  # lr, max_steps and knn_every
    assert "1.25 of 2, not finished" in page


def test_one_run_with_tsne_goes_to_its_own_folder(flags: list[str], tmp_path: Path):
    assert train([*flags, "--out", "run"]) == 0
    assert main(["run", "--map-images", "20"]) == 0
    names = {path.stem for path in (tmp_path / "run/report").glob("*.png")}
    assert names == FIGURES | {"map-run", "neighbors-run"}
    assert 'class="differs"' not in (tmp_path / "run/report/index.html").read_text()


def test_numbers_on_the_page_are_those_of_the_run(flags: list[str], tmp_path: Path):
    assert train([*flags, "--out", "run"]) == 0
    assert main(["run", "--map", "none"]) == 0
    page = (tmp_path / "run/report/index.html").read_text()
    (run,) = read_runs([tmp_path / "run"])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert f"<td>best k-NN top-1</td><td>{result['best']:.1%}</td>" in page
    assert f"<td>untrained backbone</td><td>{result['knn_untrained']:.1%}</td>" in page
    assert run.series("loss")[-1] == (2.0, result["loss"])
    assert len(run.series("knn_purity")) == len(run.evaluations) == 2


def test_a_run_that_has_just_begun(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text(json.dumps({"config": {"data": "<shapes>"}}))
    assert main(["new"]) == 0
    page = (tmp_path / "new/report/index.html").read_text()
    assert "No training step has been logged yet." in page and "&lt;shapes&gt;" in page
    assert "no map of the features" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, message, code",
    [
        ("", "RUN", 2),
        ("nowhere", "nowhere: holds no run", 1),
        ("a --map umap", "must be one of", 2),
        ("a --maps pca", "did you mean --map?", 2),
        ("a --map-images 1", "--map-images 1: must be at least 4", 2),
        ("a ./a", "is given twice", 1),
    ],
)
def test_wrong_calls(tmp_path: Path, monkeypatch, capsys, line: str, message: str, code: int):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text('{"config": {}}')
    assert main(line.split()) == code
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) <= 3


def test_names_tell_runs_apart():
    paths = [Path("/r/x/one"), Path("/r/y/one"), Path("/r/y/two")]
    assert short_names(paths[1:]) == ["one", "two"]
    assert short_names(paths) == ["x/one", "y/one", "y/two"]
