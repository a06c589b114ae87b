"""The data of the fine-tuning example: errors name broken lines; prompts are encoded right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import promptcblue as data
import pytest

from support.example import example, run

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "promptcblue"
GOOD = {
    "input": "1+1=",
    "target": "2",
    "answer_choices": ["2", "3"],
    "task_type": "cls",
    "task_dataset": "sums",
    "sample_id": "a-1",
}


def write_data(folder: Path, train: list, dev: list) -> None:
    folder.mkdir()
    for name, lines in (("train", train), ("dev", dev)):
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(raw) + b"\n")


@pytest.mark.parametrize(
    ("file", "line", "message"),
    (
        ("train", b'{"input": "1+1', "train.jsonl:2: invalid JSON"),
        ("train", b"", "train.jsonl:2: invalid JSON"),
        ("train", b"[1, 2]", "train.jsonl:2: expected an object, got list"),
        ("train", b'{"input": "\xff"}', "train.jsonl:2: not UTF-8"),
        ("dev", {"input": "x"}, "dev.jsonl:2: missing field target, answer_choices"),
        ("dev", GOOD | {"input": 3}, "dev.jsonl:2: field input must be a string, got int"),
        ("dev", GOOD | {"target": ""}, "dev.jsonl:2: field target is empty"),
        ("dev", GOOD | {"answer_choices": "2"}, "dev.jsonl:2: field answer_choices must be"),
        ("dev", GOOD | {"answer_choices": [2]}, "dev.jsonl:2: field answer_choices must be"),
        ("dev", GOOD | {"task_dataset": "new"}, "dev.jsonl:2: unknown task 'new'"),
    ),
)
def test_broken_line_is_named_and_nothing_written(file, line, message, tmp_path):
    good = [GOOD, GOOD | {"answer_choices": None}]
    lines = {name: [good[0], *([line] if name == file else []), good[1]] for name in data.SPLITS}
    write_data(tmp_path / "data", lines["train"], lines["dev"])
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--data", str(tmp_path / "data"))
    text = str(stopped.value.code)
    assert message in text
    # The text has a first line, and one line for the broken line alone.
    assert len(text.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_all_broken_lines_are_reported_up_to_a_limit(tmp_path):
    write_data(tmp_path / "data", [b"{"] * 30, [GOOD, b"{"])
    with pytest.raises(data.DataError, match=r"train.jsonl:1: (?s:.)*and 11 more problems"):
        data.load_folder(tmp_path / "data")


def test_missing_or_empty_file(tmp_path):
    with pytest.raises(data.DataError, match=r"train.jsonl: cannot be read"):
        data.load_folder(tmp_path)
    write_data(tmp_path / "data", [GOOD], [GOOD])
    (tmp_path / "data" / "dev.jsonl").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"dev.jsonl: no samples"):
        data.load_folder(tmp_path / "data")


def test_script_exits_with_an_error(tmp_path):
    """A user runs the script from another folder, without the import path of the tests."""
    write_data(tmp_path / "data", [GOOD, b"{"], [GOOD])
    command = [sys.executable, str(ROOT / "examples" / "finetune_multitask.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--data", "data"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "train.jsonl:2: invalid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_sample_or_the_generated_data_is_parsed(tmp_path):
    """The sample has all 16 tasks of PromptCBLUE. It may lie beside the repository."""
    if (SAMPLE / "train.jsonl").exists():
        train, dev = data.load_folder(SAMPLE)
        count, per_task = 16, 5
    else:
        train, dev = data.generate(0)
        count, per_task = 5, 64
    assert len({sample.task for sample in train}) == count
    assert len(train) == count * per_task
    assert {sample.task for sample in dev} == {sample.task for sample in train}
    assert any(sample.is_choice for sample in dev)
    tokenizer = data.ByteTokenizer()
    for sample in train:
        ids, answer = data.encode_pair(tokenizer, sample.input, sample.target, 10_000)
        assert bytes(ids[1:-answer]).decode() == sample.input
        assert bytes(ids[-answer:-1]).decode() == sample.target


def test_truncation_keeps_the_target_and_the_end_of_the_prompt():
    bos, eos = data.ByteTokenizer.bos_token_id, data.ByteTokenizer.eos_token_id
    cases = [
        # The end of the prompt stays.
        ("abcdefgh", "xy", 8, [bos, *b"efgh", *b"xy", eos], 3),
        # Everything fits exactly.
        ("abcd", "xy", 8, [bos, *b"abcd", *b"xy", eos], 3),
        # A target longer than three quarters of the length loses its end, eos included.
        ("abcdefgh", "stuvwxyz", 8, [bos, *b"h", *b"stuvwx"], 6),
    ]
    for text, target, length, expected, answer in cases:
        assert data.encode_pair(data.ByteTokenizer(), text, target, length) == (expected, answer)


def test_labels_are_the_target_and_nothing_else():
    sample = data.Sample("ab", "cd", (), "t")
    longer = data.Sample("abcdef", "g", (), "t")
    batch = data.Encoder(data.ByteTokenizer(), {"t": 3}, 64, "cpu").batch([sample, longer])
    eos, ignored = data.ByteTokenizer.eos_token_id, data.IGNORED
    assert batch.labels.tolist() == [
        [ignored] * 3 + [*b"cd", eos] + [ignored] * 3,
        [ignored] * 7 + [*b"g", eos],
    ]
    assert batch.attention_mask.sum(1).tolist() == [6, 9]
    assert batch.task_ids.tolist() == [3, 3]
    # Pre-training learns the prompt, and not the answer.
    labels = example.prompts_only(batch).labels
    assert labels[0].tolist() == [data.ByteTokenizer.bos_token_id, *b"ab"] + [ignored] * 6
