"""`make gpu-check` with stages that need no GPU: what it runs, ends and reports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Stage


def stage(name: str, code: str, limit_s: float = 60, **options) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit_s, **options)


def verdicts(stages: list[Stage], seconds: float = 60) -> dict[str, str]:
    return {o.stage.name: o.verdict for o in gpu_check.run_all(stages, seconds)}


def test_no_failure_hides_what_follows():
    found = verdicts(
        [
            stage("broken", "raise SystemExit(3)"),
            Stage("absent", ["/no/such/program"], 60),
            stage("optional", "print(1)", program="cotnet-ext-no-such-program"),
            stage("endless", "import time; time.sleep(60)", limit_s=1.5),
            stage("fine", "print('done')"),
        ]
    )
    assert found.pop("absent").startswith("failed: ")
    assert found == {
        "broken": "failed: exit 3",
        "optional": "skipped: no cotnet-ext-no-such-program on PATH",
        "endless": "failed: not done after 2 s",
        "fine": "passed",
    }


def test_time_is_limited_in_total():
    start = time.monotonic()
    stages = [stage(str(number), "import time; time.sleep(60)") for number in range(3)]
    found = verdicts(stages, seconds=3)
    assert time.monotonic() - start < 20
    assert found["0"] == "failed: not done after 3 s"
    assert found["1"] == found["2"] == "failed: no time was left"


@pytest.fixture(params=["heeded", "ignored"])
def interrupts(request):
    """Ctrl-C as a terminal has it, and as what runs in the background of a script has it."""
    ignored = request.param == "ignored"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_tests_that_are_cut_short_say_what_failed(tmp_path, interrupts):
    code = "import time\ndef test_a(): assert not 'the reason'\ndef test_b(): time.sleep(60)\n"
    (tmp_path / "test_slow.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-c/dev/null", str(tmp_path)]
    (outcome,) = gpu_check.run_all([Stage("tests", command, 5)], 60)
    assert outcome.verdict == "failed: not done after 5 s"
    assert "assert not 'the reason'" in outcome.output


def test_what_ignores_the_request_to_end_is_ended():
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert verdicts([stage("stubborn", code, 1.5)]) == {"stubborn": "failed: not done after 2 s"}
    assert time.monotonic() - start < 20


def test_what_a_stage_started_ends_with_it(tmp_path, interrupts):
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = verdicts([stage("parent", code, limit_s=1.5)])
    assert found == {"parent": "failed: not done after 2 s"}
    time.sleep(3)
    assert not late.exists()


def test_reports(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"ms": 1}\n{"ms": 2}\n{"ms"')  # the last was being written
    stages = [
        stage("talks", "for i in range(500): print('line', i)"),
        stage("fails", "import sys; print('why'); sys.exit(1)", rows=rows),
    ]
    outcomes = gpu_check.run_all(stages, 60)
    table, text = gpu_check.write_reports(outcomes, tmp_path / "out")
    written = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["kind"] for row in written] == ["stage", "stage", "benchmark", "benchmark"]
    assert written[0]["verdict"] == "passed" and written[0]["last_line"] == "line 499"
    assert written[1]["verdict"] == "failed: exit 1"
    assert [row["ms"] for row in written[2:]] == [1, 2]
    page = text.read_text()
    assert "failed: fails\n" in page and "\nwhy\n" in page
    assert "line 499\n" in page and "line 100\n" not in page


def test_stages_name_what_exists():
    """Files, options and selections of the real stages, on a machine that cannot run them."""
    stages = {s.name: s for s in gpu_check.stages(gpu_check.ROOT / "build" / "gpu-check")}
    for s in stages.values():
        for word in s.command:
            if word.startswith("tests/"):
                assert (gpu_check.ROOT / word).is_file(), word
    assert sum(s.limit_s for s in stages.values()) > 60 * gpu_check.MINUTES  # limits may overlap
    names = list(stages)
    assert names.index("build") < names.index("tests") < names.index("benchmarks")
    # The subset for sanitizers exists: the same selection, collected here for the CPU.
    command = stages["memcheck"].command
    words = [word for word in command[command.index("-m") :] if not word.startswith("--device")]
    done = subprocess.run(
        [sys.executable, *words, "--collect-only"],
        cwd=gpu_check.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    count = sum(line.startswith("tests/test_") for line in done.stdout.splitlines())
    assert 30 <= count <= 120, done.stdout[-2000:]


def test_environment_sees_what_its_maker_has(tmp_path):
    assert gpu_check.main(["--environment", str(tmp_path / "venv")]) == 0
    python = tmp_path / "venv" / "bin" / "python"
    code = "import torch, sys; print(torch.__file__); print(sys.prefix)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    import torch

    assert done.stdout.splitlines() == [torch.__file__, str(tmp_path / "venv")], done.stderr


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nonsense"])
    assert "no stage nonsense" in capsys.readouterr().err


def test_make_runs_it():
    makefile = (Path(gpu_check.ROOT) / "Makefile").read_text()
    assert "tests/gpu_check.py" in makefile
