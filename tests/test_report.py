"""``python -m softcl.report``: a page that stands alone, whatever state its runs are in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcl.evaluate import main as evaluate
from softcl.report import main
from softcl.reporting.figures import KINDS, draw_all, draw_knn
from softcl.reporting.page import summary_table
from softcl.reporting.runs import RunData, read_runs, short_names
from softcl.reporting.theme import COLORS
from softcl.train.__main__ import main as train

CHARTS = {kind.title for kind in KINDS}
PICTURES = {
    "Views as trained",
    "Nearest neighbours",
    "Confusion of classes by k-NN",
    "Map of the features",
}
MOST_BYTES = 3e6


def titles(page: str) -> set[str]:
    return set(re.findall("<h3>(.*?)</h3>", page))


def differing(page: str) -> set[str]:
    """Names in the table of settings in which the runs differ."""
    _, _, rest = page.partition("<h2>Settings that differ</h2>")
    return set(re.findall(r"<tr><td>(\w+)</td>", rest.partition("</table>")[0]))


def read(folder: Path) -> str:
    """The page, which is all that is in the folder, and needs nothing else."""
    assert [path.name for path in folder.iterdir()] == ["index.html"]
    page = (folder / "index.html").read_text()
    assert "<script" not in page and "http" not in page  # nothing is fetched
    assert len(page) < MOST_BYTES
    for fragment in re.findall(r'href="#([^"]*)"', page):  # of parts of a drawing
        assert page.count(f'id="{fragment}"') == 1
    return page


def run_of(**given: object) -> RunData:
    usual = {"path": Path("."), "config": {}, "versions": {}, "device": "", "backend": ""}
    rows = {"steps": [], "evaluations": [], "baselines": {}, "result": {}}
    return RunData(**{"name": "run", **usual, **rows, **given})


def test_two_runs_are_compared_on_one_page(flags: list[str], tmp_path: Path, capsys):
    assert train([*flags, "--out", "a", "--knn-every", "1"]) == 0
    assert train([*flags, "--out", "b", "--lr", "0.01", "--max-steps", "5"]) == 0
    capsys.readouterr()
    assert main(["a", "b", "--map", "pca"]) == 0
    assert "written    report/index.html" in capsys.readouterr().out
    page = read(tmp_path / "report")
    assert titles(page) == CHARTS | PICTURES
    assert all(page.count(f"<h3>{title}</h3>") == 2 for title in PICTURES)
    assert differing(page) == {"lr", "max_steps", "knn_every"}
    assert "<tr><td>lr</td><td>0.05</td><td>0.01</td></tr>" in page
    assert "1.25 of 2, not finished" in page


def test_one_run_goes_to_its_own_folder_with_both_maps(whole: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert main([str(run), "--images", "20", "--device", "cpu"]) == 0
    assert "note" not in capsys.readouterr().out
    page = read(run / "report")
    assert titles(page) == CHARTS | PICTURES and not differing(page)
    assert 'aria-label="t-SNE of the features of run"' in page
    assert 'aria-label="principal components of the features of run"' in page
    assert "20 test images" in page and "of 100 training images" in page


def test_numbers_on_the_page_are_those_of_the_run(whole: Path, tmp_path: Path):
    assert main([str(whole), "--no-pictures", "--out", str(tmp_path / "page")]) == 0
    page = read(tmp_path / "page")
    (run,) = read_runs([whole])
    result = json.loads((whole / "result.json").read_text())
    assert f"<td>best k-NN top-1</td><td>{result['best']:.1%}</td>" in page
    assert f"<td>untrained backbone</td><td>{result['knn_untrained']:.1%}</td>" in page
    assert run.series("loss")[-1] == (2.0, result["loss"])
    assert len(run.series("knn_purity")) == len(run.evaluations) == 2
    assert titles(page) == CHARTS and "<img" not in page


def test_a_set_that_is_gone_costs_its_pictures_alone(
    flags: list[str], folder: Path, tmp_path: Path, capsys
):
    shutil.copytree(folder, tmp_path / "images")
    assert train([*flags, "--data", "images", "--out", "run"]) == 0
    shutil.rmtree(tmp_path / "images")
    capsys.readouterr()
    assert main(["run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(notes) == 1 and "run: no images (" in notes[0] and "images" in notes[0]
    page = read(tmp_path / "run/report")
    assert titles(page) == CHARTS | {"Nearest neighbours"}  # as the run drew them
    assert page.count("<img") == 1


def test_a_checkpoint_that_is_gone_leaves_the_views(whole: Path, tmp_path: Path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("*.pt"):
        checkpoint.unlink()
    assert main([str(tmp_path / "run")]) == 0
    assert "run: no features (" in capsys.readouterr().out
    assert titles(read(tmp_path / "run/report")) == CHARTS | {"Views as trained"}


def test_detections_are_shown_with_their_scores(whole: Path, tmp_path: Path):
    run = shutil.copytree(whole, tmp_path / "run")
    found = run / "detect <a>"
    found.mkdir()
    Image.new("RGB", (64, 48), "red").save(found / "detections.png")
    scores = {"boxes": {"AP": 0.123, "AP50": 0.5, "AP75": None}, "masks": {"AP": "x"}}
    (found / "result.json").write_text(json.dumps({"scores": scores}))
    (run / "broken").mkdir()
    (run / "broken/detections.png").write_bytes(b"no picture")
    assert main([str(run), "--map", "none"]) == 0
    page = read(run / "report")
    assert "Detections" in titles(page)
    assert "detect &lt;a&gt;, by softcl.detect. boxes: AP 12.3, AP50 50.0<" in page
    assert page.count('alt="Detections of run"') == 1


def test_a_run_that_has_just_begun(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text(json.dumps({"config": {"data": "<shapes>"}}))
    assert main(["new"]) == 0
    page = (tmp_path / "new/report/index.html").read_text()
    assert "No training step has been logged yet." in page and "&lt;shapes&gt;" in page
    assert "new: no features" in capsys.readouterr().out


def test_scores_are_found_or_given(whole: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    wanted = ["--measure", "knn", "--measure", "retrieval", "--device", "cpu"]
    assert evaluate([str(run), *wanted, "--out", str(run / "scores.json")]) == 0
    (run / "other.json").write_text("[1")  # of somebody else
    assert main([str(run), "--no-pictures"]) == 0
    found = json.loads((run / "scores.json").read_text())
    row = f"<td>k-NN: top-1</td><td>{found['knn']['top1']:.1%}</td>"
    page = read(run / "report")
    assert page.count(row) == 1
    precision = found["retrieval"]["precision_at_10"]
    assert f"<td>retrieval: precision at 10</td><td>{precision:.1%}</td>" in page
    (run / "scores.json").rename(tmp_path / "elsewhere.json")
    assert main([str(run), "--no-pictures"]) == 0
    assert row not in read(run / "report")
    assert main([str(run), "--no-pictures", "--scores", str(tmp_path / "elsewhere.json")]) == 0
    page = read(run / "report")
    assert page.count(row) == 1 and "run</th></tr><tr><td>k-NN" in page  # whose they are
    capsys.readouterr()
    assert main([str(run), "--no-pictures", "--scores", str(run / "config.json")]) == 2
    assert "holds nothing that softcl evaluate writes" in capsys.readouterr().err


def test_knn_starts_at_zero_and_shows_what_needs_no_training():
    from matplotlib.figure import Figure

    rows = [{"knn_top1": 0.5 + x / 10, "seconds": 60.0 * x, "epoch": x} for x in (1, 2)]
    runs = [
        run_of(evaluations=rows, baselines={"untrained": 0.3, "pixels": value})
        for value in (0.2, 0.25)
    ]
    (panel,) = next(kind for kind in KINDS if kind.name == "knn").panels
    axis = Figure().subplots()
    assert draw_knn(axis, runs, panel)
    assert axis.get_ylim()[0] == 0
    drawn = sorted(line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--")
    assert np.allclose(drawn, [20, 25, 30])  # the untrained backbone is one for both
    words = [text.get_text() for text in axis.texts]
    assert words.count("70.0%") == 2 and words.count("untrained backbone") == 1
    assert words.count("raw pixels") == 2


def test_runs_without_labels_are_judged_by_rankme():
    rows = [{"rankme": value, "epoch": x + 1.0} for x, value in enumerate((3.0, 9.0, 5.0))]
    run = run_of(evaluations=rows)
    assert run.best() == rows[1] and len(run.series("rankme")) == 3
    assert [figure.name for figure in draw_all([run])] == ["quality"]


def test_an_online_probe_has_a_row_where_a_run_has_one():
    rows = [{"knn_top1": 0.5, "probe_top1": 0.25 * x, "epoch": x} for x in (1, 2)]
    with_one, without = run_of(evaluations=rows), run_of(evaluations=[{"knn_top1": 0.5}])
    found = summary_table([with_one, without])
    assert "<tr><td>last online probe</td><td>50.0%</td><td></td></tr>" in found
    assert "online probe" not in summary_table([without])


def test_colours_can_be_read_in_both_schemes():
    def luminance(color: str) -> float:
        parts = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))  # WCAG 2's

    for scheme in (0, 1):
        page = luminance(COLORS["page"][scheme])
        for name, values in COLORS.items():
            if name in ("page", "line"):
                continue
            low, high = sorted((luminance(values[scheme]), page))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, scheme)


@pytest.mark.parametrize(
    "line, message, code",
    [
        ("", "RUN", 2),
        ("nowhere", "nowhere: holds no run", 1),
        ("a --map som", "must be one of", 2),
        ("a --maps pca", "did you mean --map?", 2),
        ("a --images 1", "--images 1: must be at least 4", 2),
        ("nothing.npz", "nothing.npz: No such file", 1),
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
