"""Every method is a configuration that the trainer takes, and starts from the models it should."""

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import write_study

from codistill.config import Config, load_config
from study import runs
from study.__main__ import main
from study.methods import EPOCHS, METHODS
from study.places import Places
from study.record import read
from study.runs import Run, best_step, depth
from study.tasks import TASKS, training_problems

ROOT = Path(__file__).parents[2]
STEPS = 16


@pytest.fixture
def places(tmp_path, monkeypatch) -> Places:
    """A study with finished runs of what other runs need; the current folder is the root."""
    monkeypatch.chdir(ROOT)
    found = Places.within(tmp_path)
    needed = {method.needs for method in METHODS.values()} - {None}
    write_study(found.results / "words", sorted(needed), range(1), {})
    return found


@pytest.fixture
def run_of(places) -> Callable[[str], Run]:
    """The run of a method with seed 0."""
    return lambda name: Run(TASKS["words"], METHODS[name], 0, STEPS, places)


@pytest.fixture
def configured(run_of, tmp_path) -> Callable[[str], Config]:
    """What the trainer makes of a method's command."""

    def load(name: str) -> Config:
        script, *arguments = run_of(name).command(tmp_path / "train.jsonl")
        assert script == "train.py"
        return load_config(arguments)

    return load


@pytest.fixture
def ask(places, tmp_path, monkeypatch) -> Callable[[str, int], int]:
    """`python -m study run` of a method with seed 0; its exit code. No run may start."""
    monkeypatch.setattr(runs, "execute", lambda *_: pytest.fail("a run was started"))
    words = ["run", "--seeds", "0", "--output", str(tmp_path), "--methods"]
    return lambda name, steps: main([*words, name, "--steps", str(steps)])


@pytest.mark.parametrize("name", METHODS)
def test_the_trainer_takes_every_method(name, configured):
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


def test_continued_training_starts_from_the_last_large_model(configured, places):
    low = [name for name in METHODS if name.endswith("_ct_low")]
    assert [METHODS[name].rate for name in low] == [0.25, 0.25]
    assert configured(low[0]).large.learning_rate == 2.5e-5
    for name in (n for n, method in METHODS.items() if method.start):
        path = Path(configured(name).large.path)
        folder = places.runs / f"words-{METHODS[name].start}-0"
        assert path == folder / "export" / "step_16" / "large"


def test_teacher_is_the_best_evaluation(monkeypatch, tmp_path, configured, run_of):
    run = run_of("grpo_large")
    record = runs.read(run.record)
    for row, accuracy in zip(record.evaluations, (0.9, 0.3, 0.7, 0.7, 0.1), strict=True):
        row["large"] = accuracy
    record.write()
    # Not step 0, which is no checkpoint; of equal ones the first.
    assert best_step(run) == 8
    assert configured("kdrl").large.path.endswith("words-grpo_large-0/export/step_8/large")


def test_needed_runs_have_the_same_seed_and_budget(run_of):
    run = run_of("codistill_hints_ct")
    assert run.needed() == run_of("codistill_hints") and depth(run) == 1
    assert run_of("kdrl").needed() == run_of("grpo_large")
    assert run_of("grpo_small").needed() is None


def test_ablations_change_what_their_names_say(configured):
    assert configured("codistill_alpha1").kd.chosen_estimator == "k1"
    assert configured("kd_k3").kd.chosen_estimator == "k3"
    assert configured("hints_always").hint.epochs == EPOCHS
    assert configured("codistill_hints").hint.epochs == 1
    assert configured("hints_masked").hint.loss == "masked"
    assert configured("hints_importance").hint.loss == "importance"
    assert configured("kd_objective").kd.placement == "objective"


def test_a_run_passes_over_its_problems(configured):
    prompts = configured("grpo_small").rollout.prompts_per_step
    assert prompts == runs.PROMPTS
    assert 64 * prompts / training_problems(64, prompts) == EPOCHS
    assert training_problems(1, prompts) == prompts  # enough for the one step


def test_a_finished_run_of_another_budget_is_said_and_nothing_starts(ask, capsys, run_of):
    steps = read(run_of("grpo_large").record).steps
    assert ask("kdrl", 2 * steps) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"has {steps} steps, expected {2 * steps}" in line


def test_a_model_that_is_gone_is_said_and_nothing_starts(ask, tmp_path, capsys, run_of):
    steps = read(run_of("grpo_large").record).steps
    assert ask("kdrl", steps) == 2
    (line,) = capsys.readouterr().err.splitlines()
    folder = tmp_path / "runs" / "words-grpo_large-0"
    assert line.startswith(f"study: words-kdrl-0: starts from a model of {folder}, which is gone")
    assert line.endswith(f"delete {run_of('grpo_large').record} to train it again")


def test_finished_runs_are_not_started_again(ask, run_of):
    steps = read(run_of("grpo_large").record).steps
    assert ask("grpo_large", steps) == 0
