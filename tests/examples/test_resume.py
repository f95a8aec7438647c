"""A run that was killed and resumed ends with the very weights of one that never was; its files are always whole."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from tests.examples_path import EXAMPLES, imported

pytest.importorskip("sklearn")
v2 = pytest.importorskip("torchvision.transforms.v2")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

STEPS = 4  # an epoch
DIGITS = shlex.split("--dataset digits --validation 40 --train-samples 66 --batch-size 16")
CLEAN = ["--method", "clean", *DIGITS]
# Whatever has a state: augmentation, workers, the moving average, loss scaling, every schedule.
OPTIONS = [*DIGITS, *shlex.split("--epochs 2 --steps 1 --eps 0.1 --apgd-check 0 --workers 2 --ema 0.9 --amp fp16")]
OPTIONS += shlex.split("--awp 0.01 --schedule cosine --eps-ramp 0.5 --beta-ramp 0.5")


def crop_digits(train):
    """Augment digits, which are not otherwise: larger images take a CPU too long in float16."""
    load = train.load

    def cropped(*arguments, **options):
        data = load(*arguments, **options)
        data.train.transform = v2.RandomCrop(8, padding=1)
        return data

    train.load = cropped


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def examples():
    with imported("runtime", "train") as modules:
        crop_digits(modules.train)
        yield modules


@pytest.fixture(scope="module")
def command(examples, tmp_path_factory):
    """The options of a student with a teacher; the folder is added by each test."""
    teacher = tmp_path_factory.mktemp("teacher")
    assert examples.train.main([*CLEAN, "--epochs", "2", "--out", str(teacher)]) == 0
    return [*OPTIONS, "--teacher", str(teacher)]


@pytest.fixture(scope="module")
def uninterrupted(examples, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert examples.train.main([*command, "--out", str(out)]) == 0
    return out


@pytest.fixture
def after_step(examples, monkeypatch):
    """Makes something happen after so many steps of the optimizer."""

    def arrange(count, happen):
        update, done = examples.train.update, []

        def counted(state):
            update(state)
            done.append(state.batch)
            if len(done) == count:
                happen()

        monkeypatch.setattr(examples.train, "update", counted)

    return arrange


def kill():
    raise Killed


def interrupt():
    raise KeyboardInterrupt


def untimed(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def assert_equal_runs(examples, out, other):
    for name in ("last.pt", "best.pt"):
        state, wanted = (examples.runtime.load(folder / name) for folder in (out, other))
        for part in ("model", "ema"):
            assert all(torch.equal(value, wanted[part][key]) for key, value in state[part].items())
            assert state[part].keys() == wanted[part].keys()
        assert state["epoch"] == wanted["epoch"]
    last, wanted = (examples.runtime.load(folder / "last.pt") for folder in (out, other))
    for own, others in zip(last["optimizer"]["state"].values(), wanted["optimizer"]["state"].values(), strict=True):
        assert torch.equal(own["momentum_buffer"], others["momentum_buffer"])
    assert last["scaler"] == wanted["scaler"]
    assert torch.equal(last["by_rank"][0]["rng"]["cpu"], wanted["by_rank"][0]["rng"]["cpu"])
    logs = [untimed(examples.runtime.read_log(folder / "log.csv")) for folder in (out, other)]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


@pytest.mark.parametrize("killed_after", [2, STEPS + 3], ids=["first epoch", "second epoch"])
def test_a_run_killed_in_an_epoch_ends_as_one_that_never_was(
    examples, command, uninterrupted, after_step, tmp_path, monkeypatch, killed_after
):
    run = [*command, "--out", str(tmp_path / "run"), "--save-every", "1"]
    with monkeypatch.context():
        after_step(killed_after, kill)
        with pytest.raises(Killed):
            examples.train.main(run)
    monkeypatch.undo()
    torch.manual_seed(12345)
    state = examples.runtime.load(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["batch"]) == divmod(killed_after - 1, STEPS)  # the last step was not saved any more
    assert examples.train.main([*run, "--resume"]) == 0
    assert_equal_runs(examples, tmp_path / "run", uninterrupted)


def test_a_run_killed_in_validation_ends_as_one_that_never_was(examples, command, uninterrupted, tmp_path, monkeypatch):
    run = [*command, "--out", str(tmp_path / "run")]
    validate = examples.train.validate

    def with_signal(model, batches, attack, *arguments, **options):
        if attack is not None:  # the student's
            signal.raise_signal(signal.SIGTERM)
        return validate(model, batches, attack, *arguments, **options)

    monkeypatch.setattr(examples.train, "validate", with_signal)
    assert examples.train.main(run) == 143
    monkeypatch.undo()
    state = examples.runtime.load(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["batch"], state["history"]) == (0, STEPS, [])
    assert examples.train.main([*run, "--resume"]) == 0
    assert_equal_runs(examples, tmp_path / "run", uninterrupted)


def test_sigterm_to_all_processes_saves_at_the_step_and_exits_with_143(examples, command, uninterrupted, tmp_path):
    run = [*command, "--out", str(tmp_path / "run"), "--threads", "1"]
    # As schedulers do it: to the workers too, and while the loop waits for their images.
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(EXAMPLES)!r})
import data, train
from tests.examples.test_resume import crop_digits
crop_digits(train)
get, seen = data.Images.__getitem__, []
def slowly(self, index):
    seen.append(index)
    time.sleep(0.01)
    if len(seen) == 28:  # in the second of a worker's two batches; in validation it has 24 images
        os.killpg(0, signal.SIGTERM)
    return get(self, index)
data.Images.__getitem__ = slowly
sys.exit(train.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *run],
        cwd=EXAMPLES.parent,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM: --resume continues" in done.stderr
    assert "Traceback" not in done.stderr
    state = examples.runtime.load(tmp_path / "run" / "last.pt")
    assert state["epoch"] == 0
    assert 0 < state["batch"] <= STEPS
    assert examples.train.main([*command, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert_equal_runs(examples, tmp_path / "run", uninterrupted)


def test_a_resumed_run_knows_how_good_the_best_was(examples, command, after_step, tmp_path, monkeypatch):
    run = [*command, "--out", str(tmp_path)]
    after_step(STEPS + 1, kill)
    with pytest.raises(Killed):
        examples.train.main(run)
    monkeypatch.undo()
    state = examples.runtime.load(tmp_path / "last.pt")
    assert state["best"] == state["history"][0]["pgd_accuracy"]
    examples.runtime.save(tmp_path / "last.pt", {**state, "best": 2.0})
    before = (tmp_path / "best.pt").read_bytes()
    assert examples.train.main([*run, "--resume"]) == 0
    assert (tmp_path / "best.pt").read_bytes() == before


def test_a_finished_run_resumed_says_so_and_does_nothing(examples, command, uninterrupted, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in uninterrupted.iterdir()}
    assert examples.train.main([*command, "--out", str(uninterrupted), "--resume"]) == 0
    assert f"{uninterrupted} is finished: all 2 epochs are done" in capsys.readouterr().out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in uninterrupted.iterdir()} == before


def test_a_run_is_not_overwritten_without_resume(examples, command, uninterrupted, capsys):
    assert examples.train.main([*command, "--out", str(uninterrupted)]) == 2
    assert "holds a run; --resume continues it, or name another folder" in capsys.readouterr().err


def test_resume_without_a_run_begins_one(examples, tmp_path):
    run = [*CLEAN, "--epochs", "1", "--out", str(tmp_path / "run"), "--resume"]
    assert examples.train.main(run) == 0
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "3"], "--epochs was 2"),
        (["--lr", "0.05"], "--lr was 0.1"),
        (["--tau", "3"], "--tau was 2.0"),
        (["--no-guidance"], "--no-guidance was False"),
        (["--seed", "1"], "--seed was 0"),
    ],
)
def test_resuming_with_other_options_names_the_option(examples, command, uninterrupted, capsys, options, sentence):
    assert examples.train.main([*command, "--out", str(uninterrupted), "--resume", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {sentence} in the run in {uninterrupted} and is {options[-1]}"[:60])
    assert errors.count("\n") == 1


def test_options_that_no_weight_depends_on_may_change(examples, command, uninterrupted):
    free = ["--workers", "0", "--save-every", "3", "--apgd-check", "5", "--data", "elsewhere"]
    assert examples.train.main([*command, "--out", str(uninterrupted), "--resume", *free]) == 0


@pytest.mark.parametrize("share", [0.0, 0.07, 0.5, 0.999])  # torch.load has another error for each
def test_a_broken_checkpoint_gets_one_sentence(examples, uninterrupted, tmp_path, capsys, share):
    whole = (uninterrupted / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(share * len(whole))])
    assert examples.train.main([*CLEAN, "--out", str(tmp_path), "--resume"]) == 2
    assert "last.pt cannot be read as a checkpoint" in capsys.readouterr().err


def test_a_kill_while_saving_keeps_the_old_checkpoint(examples, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    examples.runtime.save(path, {"epoch": 1})

    def half(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        examples.runtime.save(path, {"epoch": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
    assert examples.runtime.load(path) == {"epoch": 1}


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(examples, tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    examples.runtime.save(tmp_path / "last.pt", {})
    assert order == ["fsync", "replace"]


def test_a_flipped_byte_is_never_loaded_as_another_weight(examples, uninterrupted, tmp_path):
    """Wherever it is: the file is refused, or holds what was saved (a few bytes are padding)."""
    whole, wanted = (uninterrupted / "best.pt").read_bytes(), examples.runtime.load(uninterrupted / "best.pt")
    refused = 0
    for place in range(0, len(whole), len(whole) // 200):
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        (tmp_path / "best.pt").write_bytes(flipped)
        try:
            found = examples.runtime.load(tmp_path / "best.pt")
        except ValueError:  # a sentence: test_a_broken_checkpoint_gets_one_sentence
            refused += 1
        else:
            assert all(torch.equal(value, wanted["model"][name]) for name, value in found["model"].items())
            assert {**found, "model": None, "ema": None} == {**wanted, "model": None, "ema": None}
    assert refused > 150


def test_a_full_disk_is_told_with_its_folder_and_nothing_is_lost(examples, command, tmp_path):
    """In a process whose files may not grow beyond 100 kB, which is what a full disk looks like to it."""
    run = [*command, "--out", str(tmp_path / "run"), "--threads", "1"]
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(EXAMPLES)!r})
import runtime, train
from tests.examples.test_resume import crop_digits
crop_digits(train)
save, done = runtime.save, []
def limited(path, content):
    done.append(path.name)
    if done.count("last.pt") == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    save(path, content)
runtime.save = limited
sys.exit(train.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *run], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {tmp_path / 'run' / 'last.pt'} cannot be written: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.pt",
        "config.json",
        "last.pt",
        "log.csv",
    ]
    assert examples.runtime.load(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_ctrl_c_leaves_what_was_saved_and_exits_with_130(examples, command, after_step, tmp_path, capsys):
    after_step(STEPS + 1, interrupt)  # not by a signal: shells have it ignored by what they run in the background
    assert examples.train.main([*command, "--out", str(tmp_path / "run")]) == 130
    assert "interrupted: --resume continues" in capsys.readouterr().err
    assert examples.runtime.load(tmp_path / "run" / "last.pt")["epoch"] == 1
