"""Read, check, encode and batch multi-task text in PromptCBLUE's JSON-lines format.

A file holds one sample per line, a JSON object with these fields:

    input           str, not empty        the prompt; the answer follows it
    target          str, not empty        the answer
    answer_choices  list of str, or null  the labels of a classification task
    task_type       str                   cls, ner, report_generation, ...
    task_dataset    str                   the task: CHIP-CTC, KUAKE-QIC, ...
    sample_id       str

PromptCBLUE's test file has empty targets, so evaluation uses dev.jsonl. A prompt is `[bos] input`,
an answer is `target [eos]`, and the loss is computed on the answer.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

IGNORED = -100
FIELDS = ("input", "target", "answer_choices", "task_type", "task_dataset", "sample_id")
SPLITS = ("train", "dev")
MAX_PROBLEMS = 20


class DataError(ValueError):
    """A data file cannot be used. The message names the file, the lines and the problems."""


@dataclass(frozen=True)
class Sample:
    """One line of a data file."""

    input: str
    target: str
    answer_choices: tuple[str, ...]
    task: str

    @property
    def is_choice(self) -> bool:
        """Return whether the target is one of several answer choices, which can then be ranked."""
        return len(self.answer_choices) > 1 and self.target in self.answer_choices


class Batch(NamedTuple):
    """Samples of several tasks, padded on the right."""

    input_ids: torch.Tensor  # [B, L] int64
    attention_mask: torch.Tensor  # [B, L] int64, 1 on tokens and 0 on padding
    labels: torch.Tensor  # [B, L] int64, IGNORED except on the target
    task_ids: torch.Tensor  # [B] int64


def find_problem(record) -> str | None:
    """Return the problem of one parsed line, or None."""
    if not isinstance(record, dict):
        return f"expected an object, got {type(record).__name__}"
    missing = [field for field in FIELDS if field not in record]
    if missing:
        return f"missing field {', '.join(missing)}"
    for field in FIELDS:
        value = record[field]
        if field == "answer_choices":
            is_list = isinstance(value, list) and all(isinstance(choice, str) for choice in value)
            if value is not None and not is_list:
                return f"field answer_choices must be null or a list of strings, got {value!r:.80}"
        elif not isinstance(value, str):
            return f"field {field} must be a string, got {type(value).__name__}"
        elif not value:
            return f"field {field} is empty"
    return None


def read_jsonl(path: Path, known_tasks: set[str] | None = None) -> tuple[list[Sample], list[str]]:
    """Return the samples of one file, and "file:line: problem" for each broken line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        return [], [f"{path}: cannot be read: {error.strerror}"]
    # Split bytes: str.splitlines would also split at the line separators inside a text.
    lines = raw.removesuffix(b"\n").split(b"\n") if raw else []
    samples, problems = [], [] if lines else [f"{path}: no samples"]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8-sig"))
            problem = find_problem(record)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: {error.reason} at byte {error.start}"
        except (json.JSONDecodeError, RecursionError) as error:
            problem = f"invalid JSON: {error}"
        if problem is None and known_tasks is not None:
            task = record["task_dataset"]
            if task not in known_tasks:
                problem = f"unknown task {task!r:.80}: the training data have no sample of it"
        if problem is not None:
            problems.append(f"{path}:{number}: {problem}")
            continue
        choices = tuple(dict.fromkeys(record["answer_choices"] or ()))
        samples.append(Sample(record["input"], record["target"], choices, record["task_dataset"]))
    return samples, problems


def load_folder(folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of train.jsonl and dev.jsonl. DataError lists every broken line."""
    train, problems = read_jsonl(folder / "train.jsonl")
    # If training lines are broken, tasks are missing: do not report dev lines as unknown tasks.
    known = None if problems else {sample.task for sample in train}
    dev, dev_problems = read_jsonl(folder / "dev.jsonl", known)
    problems += dev_problems
    if problems:
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"... and {len(problems) - MAX_PROBLEMS} more problems"]
        raise DataError("\n".join(problems))
    return train, dev


def toy_record(task: str, index: int, draw: random.Random) -> dict:
    """Return one sample of a generated task, in the fields of a data file."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = "".join(draw.choices(letters, k=draw.randint(3, 5)))
    number = draw.randint(10, 99)
    first, second = draw.sample(letters, 2)
    text, target, choices = {
        "capitals": (f"Write in capitals: {word}", word.upper(), None),
        "compare": (
            f"Which comes first in the alphabet, {first} or {second}?",
            min(first, second),
            [first, second],
        ),
        "first": (f"What is the first letter of {word}?", word[0], None),
        "parity": (f"Is {number} even or odd?", ("even", "odd")[number % 2], ["even", "odd"]),
        "twice": (f"Say it twice: {word}", f"{word} {word}", None),
    }[task]
    return {
        "input": f"{text}\nAnswer: ",
        "target": target,
        "answer_choices": choices,
        "task_type": "generation" if choices is None else "cls",
        "task_dataset": task,
        "sample_id": f"{task}-{index}",
    }


def generate(seed: int, per_task: int = 64) -> tuple[list[Sample], list[Sample]]:
    """Return training and dev samples of five toy tasks; dev has a quarter as many samples."""
    draw = random.Random(seed)
    splits = [[], []]
    for split, count in zip(splits, (per_task, per_task // 4), strict=True):
        for task in ("capitals", "compare", "first", "parity", "twice"):
            for index in range(count):
                record = toy_record(task, index, draw)
                choices = tuple(record["answer_choices"] or ())
                split.append(Sample(record["input"], record["target"], choices, task))
    return splits[0], splits[1]


class ByteTokenizer:
    """A tokenizer over UTF-8 bytes and three special tokens. It needs no files."""

    pad_token_id, bos_token_id, eos_token_id = 256, 257, 258
    vocab_size = 259

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the bytes of `text`."""
        # JSON can hold half of a surrogate pair, which plain UTF-8 cannot encode.
        return list(text.encode("utf-8", errors="surrogatepass"))

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of the bytes in `ids`; special tokens have none."""
        return bytes(number for number in ids if number < 256).decode("utf-8", errors="replace")


def encode_pair(tokenizer, text: str, target: str, max_length: int) -> tuple[list[int], int]:
    """Return the token ids of `[bos] text target [eos]` and the length of `target [eos]`.

    A sample longer than max_length loses tokens at the start of the prompt, because the question
    is at its end. A target longer than three quarters of max_length loses its end.
    """
    prompt = tokenizer.encode(text, add_special_tokens=False)
    answer = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
    answer = answer[: max_length - max_length // 4]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    excess = len(start) + len(prompt) + len(answer) - max_length
    return start + prompt[max(0, excess) :] + answer, len(answer)


def collate(tokenizer, pairs: list[tuple[list[int], int]], task_ids: list[int], device) -> Batch:
    """Return a Batch of encoded pairs, padded on the right."""
    # Padding is masked, so any token will do; not every tokenizer has a padding token.
    length = max(len(ids) for ids, _ in pairs)
    input_ids = torch.full((len(pairs), length), tokenizer.eos_token_id)
    attention_mask = torch.zeros(len(pairs), length, dtype=torch.int64)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (ids, answer_length) in enumerate(pairs):
        tokens = torch.tensor(ids)
        start = len(ids) - answer_length
        input_ids[row, : len(ids)] = tokens
        attention_mask[row, : len(ids)] = 1
        labels[row, start : len(ids)] = tokens[start:]
    return Batch(
        *(t.to(device) for t in (input_ids, attention_mask, labels, torch.tensor(task_ids)))
    )


@dataclass(frozen=True)
class Encoder:
    """Turns samples into batches."""

    tokenizer: ByteTokenizer
    task_ids: dict[str, int]
    max_length: int
    device: str

    def is_cut(self, sample: Sample) -> bool:
        """Return whether the target is too long and loses its end."""
        _, kept = encode_pair(self.tokenizer, sample.input, sample.target, self.max_length)
        return kept < len(self.tokenizer.encode(sample.target, add_special_tokens=False)) + 1

    def batch(self, samples: list[Sample]) -> Batch:
        """Return `samples` as one padded batch."""
        pairs = [encode_pair(self.tokenizer, s.input, s.target, self.max_length) for s in samples]
        ids = [self.task_ids[sample.task] for sample in samples]
        return collate(self.tokenizer, pairs, ids, self.device)


def shuffled(items: list, size: int, steps: int, seed: int):
    """Yield `steps` lists of `size` items, taken from one random permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(items), generator=generator).tolist()
        yield [items[index] for index in order[:size]]
        del order[:size]
