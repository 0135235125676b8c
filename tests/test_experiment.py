"""The whole workflow at toy budgets on the embedded host, through the command line's own function."""

import json
import sys

import pytest
import torch

from grafting import UserError, cli, experiment, run

TOY = [
    "distill.steps=3",
    "finetune.steps=3",
    "sample.n=70",
    "sample.steps=2",
    "distill.batch_size=8",
    "finetune.batch_size=8",
]
QUICKSTART = "configs/quickstart.yaml"


def scores(metrics):
    kept = ("fid", "denoising_loss", "class_agreement", "fid_real", "fid_reconstruction")
    return {stage: {key: values[key] for key in kept if key in values} for stage, values in metrics["stages"].items()}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "DENOISING_REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(QUICKSTART, [*TOY, f"output={tmp_path_factory.mktemp('run') / 'whole'}"])


def test_a_run_leaves_what_is_promised(finished):
    for name in (
        "config.yaml",
        "hybrid/graft.json",
        "hybrid/model.safetensors",
        "metrics.json",
        "report.html",
        "log.jsonl",
    ):
        assert (finished.folder / name).is_file()
    assert list(finished.metrics["stages"]) == ["floor", "host", "fresh", "distilled", "finetuned"]
    assert finished.metrics["plan"] == {f"mixer.{index}": "hyena_x" for index in (1, 3, 5, 7)}
    for stage in ("host", "fresh", "distilled", "finetuned"):
        values = finished.metrics["stages"][stage]
        assert {"fid", "denoising_loss", "class_agreement", "latency_ms", "parameters", "flops"} <= values.keys()
        assert len(list((finished.folder / "samples" / stage).glob("*.png"))) == 70
    assert 0 < finished.metrics["training"]["share_of_pretraining"] < 0.01
    assert finished.load_hybrid().grafts.keys() == finished.metrics["plan"].keys()


@pytest.mark.parametrize("stage", ["host", "distill", "finetune", "sample"])
def test_an_interrupted_run_ends_with_the_same_scores(finished, tmp_path, monkeypatch, stage):
    arguments = [*TOY, f"output={tmp_path / 'run'}"]
    names = {"host": "sample", "distill": "distill", "finetune": "finetune", "sample": "sample"}
    original, calls = getattr(experiment, names[stage]), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == (4 if stage == "sample" else 1):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(experiment, names[stage], interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(QUICKSTART, arguments)
    monkeypatch.setattr(experiment, names[stage], original)
    again = run(QUICKSTART, arguments)
    assert scores(again.metrics) == scores(finished.metrics)
    ours, theirs = again.load_hybrid().model.state_dict(), finished.load_hybrid().model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_config_does_not_touch_an_existing_run(finished):
    before = (finished.folder / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="holds a run of another config"):
        run(QUICKSTART, [*TOY, f"output={finished.folder}", "seed=5"])
    assert (finished.folder / "metrics.json").read_bytes() == before


def test_a_misfit_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="out of range"):
        run(QUICKSTART, [f"output={tmp_path / 'x'}", "graft.0.slots={indices: [99]}"])
    with pytest.raises(UserError, match="at least 65 images"):
        run(QUICKSTART, [f"output={tmp_path / 'x'}", "sample.n=64"])
    assert not (tmp_path / "x").exists()


def graft_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["graft", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_evaluate_agrees_with_the_run(finished, monkeypatch, capsys):
    folder = finished.folder / "samples" / "host"
    arguments = ["evaluate", folder, "--reference", "embedded:digits", "--extractor", "digits", "--json"]
    code, out, _ = graft_command(monkeypatch, capsys, *arguments)
    assert code == 0
    assert json.loads(out)["fid"] == finished.metrics["stages"]["host"]["fid"]


def test_inspect_operators_and_sample(finished, monkeypatch, capsys, tmp_path):
    code, out, _ = graft_command(
        monkeypatch, capsys, "inspect", finished.folder / "hybrid", "--batch-size", 1, "--json"
    )
    slots = json.loads(out)["slots"]
    assert code == 0
    assert slots["mixer.1"]["operator"] == "hyena_x"
    assert slots["mixer.0"]["operator"] == "attention"
    code, out, _ = graft_command(monkeypatch, capsys, "operators", "--json")
    assert {"attention", "sliding_window", "hyena_x", "hyena_y", "hyena_se", "mlp", "hyena_x_mlp"} <= json.loads(
        out
    ).keys()
    arguments = ["sample", "embedded:digits-dit", "-n", 3, "--steps", 2, "-o", tmp_path / "pictures", "--condition", 4]
    assert graft_command(monkeypatch, capsys, *arguments)[0] == 0
    assert json.loads((tmp_path / "pictures" / "labels.json").read_text()) == [4, 4, 4]


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such.yaml"],
        ["run", QUICKSTART, "distill.stepz=1"],
        ["run", QUICKSTART, "graft.0.operator=hyena_q"],
        ["run", QUICKSTART, "data.source=/no/such/folder"],
        ["run", QUICKSTART, "operators=[missing.py]"],
        ["inspect", "/no/such/host"],
        ["evaluate", "/no/such/folder", "--reference", "embedded:digits"],
    ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments, monkeypatch, capsys, tmp_path):
    code, _, err = graft_command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
