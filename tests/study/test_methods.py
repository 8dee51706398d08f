"""Every method is a configuration that the trainer takes, and starts from the models it should."""

from pathlib import Path

import pytest
from synthetic import write_study

from codistill.config import Config, load_config
from study import runs
from study.__main__ import main
from study.methods import EPOCHS, METHODS
from study.record import read
from study.runs import Run, best_step, depth
from study.tasks import TASKS, training_problems

ROOT = Path(__file__).parents[2]
STEPS = 16


@pytest.fixture(autouse=True)
def finished(tmp_path, monkeypatch):
    """Finished runs of what other runs need, and the repository's root as the current folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    needed = {method.needs for method in METHODS.values()} - {None}
    write_study(tmp_path / "words", sorted(needed), range(1), {})


def run_of(name: str) -> Run:
    return Run(TASKS["words"], METHODS[name], 0, STEPS)


def configured(name: str) -> Config:
    script, *arguments = run_of(name).command()
    assert script == "train.py"
    return load_config(arguments)


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_takes_every_method(name):
    config, method = configured(name), METHODS[name]
    assert config.seed == 0 and config.name == f"words-{name}-0"
    assert set(config.evaluation.sets) == {"sums", "long_sums", "products", "longer"}
    trained = ["small", "large"] if config.algorithm == "codistill" else list(config.trained)
    for model in trained:
        rate = getattr(config, model).learning_rate
        assert rate == TASKS["words"].learning_rates[model] * method.rate
    assert config.training.steps == (4 if method.start else STEPS)
    is_all = config.downsample.method == "none"
    assert is_all == (name.startswith("grpo") or bool(method.start) or "no_downsampling" in name)
    kept = config.rollout.num_generations if is_all else config.downsample.keep
    assert (config.rollout.num_generations, kept) == ((8, 8) if is_all else (14, 8))


def test_continued_training_starts_from_the_last_large_model():
    low = [name for name in METHODS if name.endswith("_ct_low")]
    assert [METHODS[name].rate for name in low] == [0.25, 0.25]
    assert configured(low[0]).large.learning_rate == 2.5e-5
    for name in (n for n, method in METHODS.items() if method.start):
        path = Path(configured(name).large.path)
        assert path == runs.RUNS / f"words-{METHODS[name].start}-0" / "export" / "step_16" / "large"


def test_teacher_is_the_best_evaluation(monkeypatch, tmp_path):
    run = run_of("grpo_large")
    record = runs.read(run.record)
    for row, accuracy in zip(record.evaluations, (0.9, 0.3, 0.7, 0.7, 0.1), strict=True):
        row["large"] = accuracy
    record.write()
    # Not step 0, which is no checkpoint; of equal ones the first.
    assert best_step(run) == 8
    assert configured("kdrl").large.path.endswith("words-grpo_large-0/export/step_8/large")


def test_needed_runs_have_the_same_seed_and_budget():
    run = run_of("codistill_hints_ct")
    assert run.needed() == run_of("codistill_hints") and depth(run) == 1
    assert run_of("kdrl").needed() == run_of("grpo_large")
    assert run_of("grpo_small").needed() is None


def test_ablations_change_what_their_names_say():
    assert configured("codistill_alpha1").kd.chosen_estimator == "k1"
    assert configured("kd_k3").kd.chosen_estimator == "k3"
    assert configured("hints_always").hint.epochs == EPOCHS
    assert configured("codistill_hints").hint.epochs == 1
    assert configured("hints_masked").hint.loss == "masked"
    assert configured("hints_importance").hint.loss == "importance"
    assert configured("kd_objective").kd.placement == "objective"


def test_a_run_passes_over_its_problems():
    prompts = configured("grpo_small").rollout.prompts_per_step
    assert prompts == runs.PROMPTS
    assert 64 * prompts / training_problems(64, prompts) == EPOCHS
    assert training_problems(1, prompts) == prompts  # enough for the one step


def test_a_finished_run_of_another_budget_is_said_and_nothing_starts(monkeypatch, capsys):
    monkeypatch.setattr(runs, "execute", lambda run: pytest.fail("a run was started"))
    steps = read(run_of("grpo_large").record).steps
    assert main(["run", "--methods", "kdrl", "--seeds", "0", "--steps", str(2 * steps)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"has {steps} steps, expected {2 * steps}" in line


def test_a_model_that_is_gone_is_said_and_nothing_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "execute", lambda run: pytest.fail("a run was started"))
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    steps = read(run_of("grpo_large").record).steps
    assert main(["run", "--methods", "kdrl", "--seeds", "0", "--steps", str(steps)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    folder = tmp_path / "runs" / "words-grpo_large-0"
    assert line.startswith(f"study: words-kdrl-0: starts from a model of {folder}, which is gone")
    assert line.endswith(f"delete {run_of('grpo_large').record} to train it again")


def test_finished_runs_are_not_started_again(monkeypatch):
    monkeypatch.setattr(runs, "execute", lambda run: pytest.fail("a run was started"))
    steps = read(run_of("grpo_large").record).steps
    assert main(["run", "--methods", "grpo_large", "--seeds", "0", "--steps", str(steps)]) == 0
