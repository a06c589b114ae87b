"""The command .ci/gpu: its stages exist, and a run that is cut keeps what it has."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from benchmarks import bench_grouped
from support.selection import exhaustive

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu():
    """The command as a module; its file has no suffix."""
    loader = SourceFileLoader("gpu_command", str(ROOT / ".ci" / "gpu"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    loader.exec_module(module)
    yield module
    del sys.modules[loader.name]


def test_the_paths_of_its_commands_exist(gpu, tmp_path):
    for stage in gpu.stages(tmp_path, "abc"):
        paths = [part for part in stage.command if part.startswith((".ci", "tests", "benchmarks"))]
        assert all((ROOT / path).exists() for path in paths), stage


def test_the_benchmark_takes_its_arguments(gpu, tmp_path):
    suites = [stage for stage in gpu.stages(tmp_path, "abc") if "--suite" in stage.command]
    assert {stage.name for stage in suites} == set(bench_grouped.SUITES) | {"machine"}
    for stage in suites:
        parsed = bench_grouped.make_parser().parse_args(stage.command[2:])
        assert (parsed.out, parsed.commit) == (tmp_path, "abc")
        if "machine" not in stage.command:
            parsed.device = "cpu"
            assert bench_grouped.make_jobs(stage.name, parsed, None)
        bench_grouped.check_arguments(bench_grouped.make_parser(), parsed)


def test_the_tests_of_its_stages_are_all_tests_of_a_gpu(gpu, tmp_path):
    """A folder with tests marked gpu that no stage names would never run on hardware."""
    named = [part for stage in gpu.stages(tmp_path, "") for part in stage.command]
    folders = [ROOT / part for part in named if part.startswith("tests/")]
    marked = [
        path
        for path in (ROOT / "tests").glob("*/test_*.py")
        if "mark.gpu" in path.read_text() and path != Path(__file__)
    ]
    left = [path for path in marked if not any(path.is_relative_to(each) for each in folders)]
    assert marked
    assert not left


def stage(gpu, name: str, code: str, seconds: int = 60):
    command = (sys.executable, "-c", code)
    return gpu.Stage(name, seconds, command, command)


def run(gpu, monkeypatch, tmp_path, stages, *arguments: str) -> tuple[int, str]:
    """Return the exit code and the summary of a dry run of these stages."""
    monkeypatch.setattr(gpu, "stages", lambda out, commit: stages)
    code = gpu.main([str(tmp_path / "out"), "--commit", "abc", "--dry-run", *arguments])
    return code, (tmp_path / "out" / "summary.md").read_text()


def test_a_stage_that_fails_does_not_stop_the_next(gpu, monkeypatch, tmp_path):
    bad, good = stage(gpu, "bad", "raise SystemExit(3)"), stage(gpu, "good", "print('a | b')")
    code, page = run(gpu, monkeypatch, tmp_path, [bad, good])
    assert code == 1
    assert "| bad | failed (3) |" in page
    assert "| good | passed |" in page
    assert "a \\| b |" in page
    assert "a | b" in (tmp_path / "out" / "log.txt").read_text()


def test_a_stage_that_takes_too_long_is_cut_with_its_children(gpu, monkeypatch, tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(20); open({str(mark)!r}, 'w')"
    code = "import subprocess, sys; print('begun', flush=True); "
    code += f"subprocess.run([sys.executable, '-c', {child!r}])"
    slow, after = stage(gpu, "slow", code, seconds=8), stage(gpu, "after", "print('ran')")
    exit_code, page = run(gpu, monkeypatch, tmp_path, [slow, after])
    assert exit_code == 1
    assert "| slow | cut after 8 s |" in page
    assert "begun" in (tmp_path / "out" / "log.txt").read_text()
    assert "| after | passed |" in page
    assert not mark.exists()


def test_no_stage_begins_when_the_limit_is_reached(gpu, monkeypatch, tmp_path):
    stages = [stage(gpu, "only", "print('ran')")]
    code, page = run(gpu, monkeypatch, tmp_path, stages, "--limit", "1")
    assert code == 1
    assert "| only | not started | 0 | no time was left |" in page


def test_what_a_user_may_get_wrong(gpu, tmp_path, capsys):
    for arguments, said in (
        ([str(tmp_path), "--dry-run", "--stages", "nosuch"], "nosuch"),
        *([([str(tmp_path)], "no CUDA device")] if not gpu.architecture() else []),
    ):
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert said in capsys.readouterr().err


@exhaustive
def test_dry_run(gpu, tmp_path):
    """Every command of a stage works on this machine, at toy size; tests are only collected."""
    code = gpu.main([str(tmp_path), "--dry-run"])
    assert code == 0, (tmp_path / "log.txt").read_text()
    assert (tmp_path / "linear.json").exists()
