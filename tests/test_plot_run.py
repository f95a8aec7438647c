"""plot_run.py draws what runs have logged, and answers a bad log or path in a sentence."""

import pytest

from tests.examples_path import imported

pytest.importorskip("matplotlib")
pytest.importorskip("tyro")


@pytest.fixture(scope="module")
def examples():
    with imported("plot_run", "runtime") as modules:
        yield modules


@pytest.fixture
def run(examples, tmp_path):
    """A function that makes a run's folder: two epochs that logged these columns."""

    def make(name, **columns):
        (tmp_path / name).mkdir()
        rows = [dict.fromkeys(examples.runtime.COLUMNS) | {"epoch": epoch} | columns for epoch in (1, 2)]
        examples.runtime.write_log(tmp_path / name / "log.csv", rows)
        return tmp_path / name

    return make


def refused(examples, capsys, *options):
    """The one sentence that the command refuses its options with."""
    assert examples.plot_run.main([*map(str, options)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    return error


def test_curves_of_several_runs_become_a_png(examples, run, tmp_path, capsys):
    out = tmp_path / "curves" / "a.png"
    runs = run("a", clean_accuracy=0.5, loss=1.0), run("b", clean_accuracy=0.7, guidance=2.0)
    assert examples.plot_run.main([*map(str, runs), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["a.png"]
    assert f"saved {out}" in capsys.readouterr().out


def test_each_run_has_a_line_for_what_it_logged(examples, run):
    student = run("s", clean_accuracy=0.9, pgd_accuracy=0.5, guidance=1.0, consistency=0.5, loss=4.0)
    teacher = run("t", clean_accuracy=0.95, loss=0.1)
    figure = examples.plot_run.draw({path.name: examples.plot_run.load(path) for path in (student, teacher)})
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    assert lines == [
        {"s: clean": [[1, 0.9], [2, 0.9]], "s: under PGD": [[1, 0.5], [2, 0.5]], "t: clean": [[1, 0.95], [2, 0.95]]},
        {
            "s: guidance": [[1, 1.0], [2, 1.0]],
            "s: consistency": [[1, 0.5], [2, 0.5]],
            "s: loss": [[1, 4.0], [2, 4.0]],
            "t: loss": [[1, 0.1], [2, 0.1]],
        },
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch,loss\n1,2\n",
        b"\xff\xfe\x00\x80" * 99,
        b"epoch,clean_accuracy,pgd_accuracy,guidance,consistency,loss\n1,0.5,a,,,\n",
        b"epoch,clean_accuracy,pgd_accuracy,guidance,consistency,loss\n1,0.5,0.4,,,,,,7\n",
        b"epoch,clean_accuracy,pgd_accuracy,guidance,consistency,loss\n",
        b"epoch,clean_accuracy,pgd_accuracy,guidance,consistency,loss\n,0.5,,,,\n",
        b"epoch,clean_accuracy,pgd_accuracy,guidance,consistency,loss\n1," + b"1" * 200_000,
    ],
)
def test_a_broken_log_gets_one_sentence(examples, tmp_path, capsys, content):
    (tmp_path / "log.csv").write_bytes(content)
    error = refused(examples, capsys, tmp_path, "-o", tmp_path / "a.png")
    assert f"{tmp_path / 'log.csv'} is not a log of train.py, or broken" in error
    assert not (tmp_path / "a.png").exists()


def test_a_folder_without_a_log_and_no_folder_get_one_sentence(examples, tmp_path, capsys):
    assert "has no log.csv" in refused(examples, capsys, tmp_path, "-o", tmp_path / "a.png")
    assert "has no log.csv" in refused(examples, capsys, __file__, "-o", tmp_path / "a.png")
    assert "RUN must name" in refused(examples, capsys)


def test_a_picture_that_cannot_be_written_gets_one_sentence(examples, run, tmp_path, capsys):
    folder = run("a", loss=1.0)
    assert "--out must name a .png file, got a.jpg" in refused(examples, capsys, folder, "-o", "a.jpg")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(examples, capsys, folder, "-o", tmp_path / "file" / "a.png")
    (tmp_path / "folder.png").mkdir()
    assert "folder.png cannot be written" in refused(examples, capsys, folder, "-o", tmp_path / "folder.png")
    assert "/proc/a.png cannot be written" in refused(examples, capsys, folder, "-o", "/proc/a.png")
