"""The fine-tuning example learns, writes and reloads, and refuses wrong options."""

import json
import math
import re

import pytest
import torch

from support.example import example, run
from support.selection import exhaustive

FILES = {
    "adapter.safetensors",
    "adapter_config.json",
    "expert_load.png",
    "loss_curve.png",
    "metrics.json",
}


@pytest.mark.parametrize("preset", ("moelora", "ming"))
def test_learns_writes_and_reloads(preset, tmp_path, capsys):
    # Without the native library a dropout mask per expert takes most of the time of a step.
    short = ["--steps", "60", "--lr", "1e-2", "--pretrain-steps", "40", "--dropout", "0"]
    metrics = run(tmp_path, "--preset", preset, *short)
    printed = capsys.readouterr().out
    assert "generated toy tasks" in printed
    assert "reload: identical" in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == FILES | {"base"}
    curve = metrics["train_loss"]
    # Measured: 0.82 and 0.87. Most toy tasks copy words, and this model is too small for that.
    assert sum(curve[-10:]) < 0.93 * sum(curve[:10])
    for task, row in metrics["dev_after"].items():
        assert row["loss"] < metrics["dev_before"][task]["loss"], task
        assert row["choices"] == (16 if task in ("compare", "parity") else 0)
        assert re.search(rf"^{task} .*->", printed, re.MULTILINE), f"no row of {task}"
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert stored["train_loss"] == curve
    # The weights of a token are a softmax: they sum to 1.
    load = torch.tensor(metrics["expert_load"]["values"])
    layers = {"moelora": 2 * 7, "ming": 2 * 3}[preset]
    assert load.shape == (5, layers, 8)
    torch.testing.assert_close(load.sum(-1), torch.ones(5, layers), atol=1e-5, rtol=0)
    if preset == "moelora":
        # All layers have the same gate, and two tasks have different ones.
        assert (load == load[:, :1]).all()
        assert (load[0] != load[1]).any()


@pytest.mark.parametrize(
    "arguments",
    (
        pytest.param(["--preset", "loramoe"], marks=exhaustive),
        pytest.param(["--preset", "hydralora"], marks=exhaustive),
        pytest.param(["--preset", "mola"], marks=exhaustive),
        pytest.param(["--preset", "lora"], marks=exhaustive),
        ["--preset", "ming", "--aux", "load_balance,z"],
        pytest.param(["--preset", "ming", "--dtype", "bf16"], marks=exhaustive),
        ["--preset", "moelora", "--dtype", "bf16"],
    ),
    ids=lambda arguments: "-".join(arguments[1::2]),
)
def test_every_preset_and_option_runs(arguments, tmp_path, capsys):
    metrics = run(tmp_path, *arguments, "--steps", "2", "--pretrain-steps", "0")
    assert "reload: identical" in capsys.readouterr().out
    assert all(map(math.isfinite, metrics["train_loss"]))


@pytest.mark.parametrize(
    "options",
    (
        ["--preset", "ming", "--aux", "load_balance,z"],
        pytest.param(["--preset", "moelora"], marks=exhaustive),
    ),
)
def test_the_trainer_has_the_losses_of_the_loop(options, tmp_path, capsys):
    """Hugging Face's Trainer does the same steps, and logs the expert load."""
    short = [*options, "--dropout", "0", "--steps", "6", "--pretrain-steps", "2"]
    loop = run(tmp_path, *short)
    metrics = run(tmp_path, *short, "--trainer")
    assert capsys.readouterr().out.count("reload: identical") == 2
    # One divides the loss of each token, the other their sum: the roundings differ.
    assert metrics["train_loss"] == pytest.approx(loop["train_loss"], rel=1e-5)
    assert len(metrics["trainer_logs"]) == 6
    for entry in metrics["trainer_logs"]:
        assert 1 / 8 < entry["expert_load_max"] < 1
        assert ("aux_loss" in entry) == ("--aux" in options)
    assert "trainer_logs" not in loop


def test_the_trainer_refuses_a_gpu_with_a_number(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--trainer", "--device", "cuda:1")
    assert "--device: with --trainer must be cpu or cuda, got cuda:1" in capsys.readouterr().err


@exhaustive
def test_same_seed_same_curve(tmp_path):
    """The seed decides the weights, the order of samples and the dropout masks."""
    short = ["--preset", "ming", "--dropout", "0.1", "--steps", "3", "--pretrain-steps", "2"]
    curves = [run(tmp_path, *short, "--seed", seed)["train_loss"] for seed in ("1", "1", "2")]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_a_stored_model_with_another_tokenizer(tmp_path, capsys):
    """The tokenizer has neither a bos token nor a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    example.make_base(259, 64, hidden=32, layers=1).save_pretrained(tmp_path / "model")
    run(tmp_path, "--model", str(tmp_path / "model"), "--steps", "2")
    assert "reload: identical" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("rate", ("nan", "0", "-1", "inf"))
def test_a_learning_rate_that_trains_nothing_is_refused(rate, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--lr", rate)
    assert "--lr: must be positive and finite" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--out: .*file"):
        run(tmp_path, "--out", str(tmp_path / "file" / "out"))


@pytest.mark.parametrize(
    "arguments",
    (["--preset", "moelora", "--aux", "z"], ["--preset", "ming", "--aux", "balance"]),
    ids=["no-token-router", "unknown-name"],
)
def test_aux_that_does_not_fit_is_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match="aux"):
        run(tmp_path, *arguments)
    assert not (tmp_path / "out").exists()
