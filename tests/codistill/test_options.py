"""What an option changes in a whole step, and that it changes nothing else; several processes."""

import math
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from tiny import FakeGrader, make_rollouts, merged

from codistill import checkpoint
from codistill.config import Config
from codistill.data import draw, redraw
from codistill.engine import Completion
from codistill.inputs import load_inputs
from codistill.learner import Learner
from codistill.output.metrics import StepMetrics
from codistill.rollout import Rollouts
from codistill.trainer import Trainer

END, VOCAB = 1, 18
BASE = {"downsample": {"method": "none"}}  # all are kept: what is kept moves with no reward
SMALL, LARGE = {"loss/small", "grad_norm/small"}, {"loss/large", "grad_norm/large"}
KD = {"reward/kd", "reward/effective"} | SMALL
RATIOS = r"ratio/(small|large)_.*"
LARGE_RATIO = r"ratio/large_.*"
base_numbers: dict[str, float] = {}


def step(trainer: Trainer) -> dict[str, float]:
    numbers, _, _ = trainer.step(1)
    return {k: v for k, v in numbers.items() if not k.startswith(("time/", "tokens_per_second"))}


@pytest.mark.parametrize(
    ("changes", "must", "may"),
    [
        ({"kd": {"alpha": 3.0}}, KD, ""),
        ({"kd": {"alpha": 3.0, "alpha_end": 1.0}}, KD, ""),
        ({"kd": {"estimator": "k3"}}, KD, ""),
        ({"kd": {"estimator": "exact"}}, KD, ""),
        ({"kd": {"placement": "objective"}}, KD | {"kl/small_kd"}, ""),
        ({"downsample": {"method": "top_bottom"}}, SMALL | LARGE, f"{RATIOS}|reward/kept_accuracy"),
        ({"downsample": {"method": "random"}}, SMALL | LARGE, f"{RATIOS}|reward/kept_accuracy"),
        ({"advantage": {"baseline": "leave_one_out"}}, SMALL | LARGE, ""),
        ({"advantage": {"scale": "std"}}, SMALL | LARGE, ""),
        ({"advantage": {"scale": "beta"}}, SMALL | LARGE, ""),
        ({"loss": {"epsilon_high": 2.0}}, LARGE | {"ratio/large_clip_fraction"}, ""),
        ({"loss": {"kind": "cispo"}}, {"loss/small"} | LARGE, LARGE_RATIO),
        ({"loss": {"kind": "gspo"}}, LARGE, "ratio/large_clip_fraction"),
        ({"loss": {"kind": "gmpo"}}, LARGE, "ratio/large_clip_fraction"),
        ({"loss": {"normalization": "sequence"}}, SMALL | LARGE, ""),
        ({"loss": {"normalization": "tokens"}}, SMALL | LARGE, ""),
        ({"loss": {"large_dual_clip": 2.0}}, LARGE | {"ratio/large_clip_fraction"}, ""),
        ({"loss": {"large_log_ratio_clamp": 1.0}}, LARGE, "ratio/large_clip_fraction"),
        ({"loss": {"beta": 0.1}}, {"kl/small_reference", "kl/large_reference"}, ""),
        ({"rollout": {"truncated": "mask"}}, SMALL | LARGE, RATIOS),
        ({"rollout": {"truncated": "zero_reward"}}, {"reward/effective"} | SMALL | LARGE, RATIOS),
        (
            {"training": {"inner_epochs": 2}},
            {"loss/small", "loss/large", "ratio/small_mean"},
            f"{RATIOS}|grad_norm/.*|learning_rate/.*",
        ),
        ({"training": {"update_order": "large_first"}}, SMALL, ""),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_an_option_changes_what_it_names_and_nothing_else(make_trainer, changes, must, may):
    if not base_numbers:
        base_numbers.update(step(make_trainer(BASE, FakeGrader())))
    numbers = step(make_trainer(merged(BASE, changes), FakeGrader()))
    assert base_numbers.keys() <= numbers.keys()
    different = {
        key
        for key, value in numbers.items()
        if not math.isclose(value, base_numbers.get(key, math.nan), rel_tol=1e-5, abs_tol=1e-7)
    }
    assert must <= different
    assert not {key for key in different - must if not (may and re.fullmatch(may, key))}


def test_leave_one_out_is_a_larger_learning_rate(make_trainer):
    """Lemma F.1's remark: the gradient of RLOO is that of Eq. 5 times G / (G - 1), here 4 / 3."""
    norms = {}
    for baseline in ("mean", "leave_one_out"):
        numbers = step(make_trainer({"advantage": {"baseline": baseline}}, FakeGrader()))
        norms[baseline] = numbers["grad_norm/small"]
    assert norms["leave_one_out"] == pytest.approx(norms["mean"] * 4 / 3, rel=1e-5)


def test_bounds_of_the_large_model_are_its_own(make_trainer):
    trainer = make_trainer({"loss": {"large_dual_clip": 3.0, "large_log_ratio_clamp": 2.0}})
    small, large = trainer.learners["small"], trainer.learners["large"]
    assert (small.loss.dual_clip, small.loss.log_ratio_clamp) == (None, None)
    assert (large.loss.dual_clip, large.loss.log_ratio_clamp) == (3.0, 2.0)


def test_inner_epochs_are_optimizer_steps(make_trainer):
    trainer = make_trainer({"training": {"inner_epochs": 3, "steps": 4}}, FakeGrader())
    numbers, _, _ = trainer.step(1)
    for learner in trainer.learners.values():
        assert learner.schedule.last_epoch == 3
        (state, *_) = learner.optimizer.state.values()
        assert state["step"] == 3
    assert numbers["ratio/small_mean"] != pytest.approx(
        1, abs=1e-4
    )  # off-policy from the second on
    for number in (2, 3, 4):
        trainer.step(number)
    assert trainer.learners["small"].schedule.get_last_lr()[0] == pytest.approx(0)  # cosine: done


def test_mini_batches_are_optimizer_steps_on_parts_of_the_rollouts(make_trainer, monkeypatch):
    """Two prompts, two inner epochs: each prompt's rollouts alone, one after the other, twice."""
    trainer = make_trainer({"training": {"mini_batches": 2, "inner_epochs": 2}}, FakeGrader())
    seen: dict[str, list[list[int]]] = {name: [] for name in trainer.learners}
    plain = Learner.backward

    def backward(learner, batches, *arguments, **settings):
        seen[learner.name].append(sorted(row for batch in batches for row in batch.rows.tolist()))
        plain(learner, batches, *arguments, **settings)

    monkeypatch.setattr(Learner, "backward", backward)
    numbers, _, scored = trainer.step(1)
    kept = scored.credit.kept.tolist()
    half = len(kept) // 2
    for learner in trainer.learners.values():
        assert seen[learner.name] == [kept[:half], kept[half:]] * 2
        assert learner.schedule.last_epoch == 4
    assert numbers["ratio/small_mean"] != pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("algorithm", ["codistill", "grpo"])
def test_reference_is_the_start_and_stays(make_trainer, algorithm):
    trainer = make_trainer({"algorithm": algorithm, "loss": {"beta": 0.1}}, FakeGrader())
    names = {"codistill": {"small", "large"}, "grpo": {"small"}}[algorithm]
    assert trainer.references.keys() == names
    start = {
        name: [weight.clone() for _, weight in trainer.policies[name].full_weights()]
        for name in names
    }
    kl = []
    for number in (1, 2):
        numbers, _, _ = trainer.step(number)
        kl.append({name: numbers[f"kl/{name}_reference"] for name in names})
    for name in names:
        assert kl[0][name] < 1e-6 < 1e-3 < kl[1][name]
        reference = [weight for _, weight in trainer.references[name].full_weights()]
        assert all(torch.equal(a, b) for a, b in zip(reference, start[name], strict=True))


def test_beta_holds_a_model_back(make_trainer):
    kl = []
    for beta in (0.001, 10.0):
        trainer = make_trainer({"algorithm": "grpo", "loss": {"beta": beta}}, FakeGrader())
        kl.append([trainer.step(number)[0]["kl/small_reference"] for number in range(1, 4)][-1])
    assert kl[1] < 0.7 * kl[0]


def test_weights_are_whole_numbers_of_float32_after_any_pass(make_trainer):
    changes = {"training": {"dtype": "bfloat16", "update_order": "large_first"}}
    trainer = make_trainer(changes, FakeGrader())
    trainer.step(1)
    rollouts = trainer.generation.rollouts(2, StepMetrics(torch.device("cpu")))
    trainer.score(2, rollouts, StepMetrics(torch.device("cpu")))  # ends with a forward pass
    for learner in trainer.learners.values():
        saved = checkpoint.states_of([learner])[learner.name]["model"]
        assert {weight.dtype for weight in saved.values()} == {torch.float32}
    trainer.score(2, rollouts, StepMetrics(torch.device("cpu")))
    for policy in trainer.policies.values():
        weights = dict(policy.full_weights())
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert all((w != w.bfloat16()).any() for name, w in weights.items() if "norm" not in name)


def test_redraw_offers_what_the_step_has_not_drawn():
    rounds = list(redraw(11, 4, 2, seed=1))
    first = draw(11, 4, 2, 1)
    assert [len(indices) for indices in rounds] == [4]  # 7 are left, 3 are too few
    assert not set(rounds[0]) & set(first)
    assert [list(r) for r in redraw(11, 4, 2, seed=1)] == [list(r) for r in rounds]
    assert [list(r) for r in redraw(40, 4, 3, seed=1)] != [
        list(r) for r in redraw(40, 4, 2, seed=1)
    ]
    assert list(redraw(4, 4, 0, seed=1)) == []


def test_dynamic_sampling_takes_the_prompts_with_a_signal(make_trainer, monkeypatch):
    """8 problems, 2 a step: round after round until two have right and wrong rollouts."""
    changes = {"rollout": {"prompts_per_step": 2}, "training": {"tokens_per_micro_batch": 40}}
    signal: dict[str, bool] = {}
    monkeypatch.setattr(
        Rollouts,
        "has_signal",
        lambda self, count: torch.tensor([signal[p.prompt] for p in self.problems[::count]]),
    )
    for rounds, expected in ((1, None), (2, 2), (4, 3)):
        changes["rollout"]["sampling_rounds"] = rounds
        trainer = make_trainer(changes, FakeGrader())
        problems = trainer.inputs.problems
        order = [int(i) for i in draw(8, 2, 0, 0)]
        order += [int(i) for part in redraw(8, 2, 0, 0) for i in part]
        prompts = [problems[i].prompt for i in order]
        # of the order drawn, those in places 1 and 4 have a signal: the third round is the last
        signal.update({prompt: place in (1, 4) for place, prompt in enumerate(prompts)})
        numbers, rollouts, _ = trainer.step(1)
        assert numbers.get("rollout/sampling_rounds") == expected
        used = list(dict.fromkeys(problem.prompt for problem in rollouts.problems))
        places = [prompts.index(prompt) for prompt in used]
        # two rounds find one of the two; the first drawn fills up
        assert places == {1: [0, 1], 2: [1, 0], 4: [1, 4]}[rounds]
        assert len(rollouts) == 12


def test_signal_is_right_and_wrong():
    rollouts = make_rollouts([1] * 6, [0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert rollouts.has_signal(2).tolist() == [False, True, False]


class FakeEngine:
    """Text that depends on seeds alone, not on which process asks."""

    name = "fake"

    def generate(self, prompts, seeds, sampling):
        return [
            self.completion(np.random.default_rng([seed, member]), sampling.max_tokens)
            for seed in seeds
            for member in range(sampling.num_generations)
        ]

    def completion(self, random, longest: int) -> Completion:
        length = int(random.integers(1, longest + 2))
        tokens = random.integers(2, VOCAB, min(length, longest)).tolist()
        if length <= longest:
            tokens[-1] = END
        return Completion(tokens, (-random.random(len(tokens))).tolist(), length > longest)

    def sleep(self) -> None:
        pass

    def wake_up(self) -> None:
        pass

    def sync(self):
        pass


def brevity(prompts, completions, completion_ids, **columns):
    return [-len(ids) / 10 for ids in completion_ids]


MANY = [
    {  # no penalty: the loss in one pass over the head
        "loss": {"kind": "gspo", "large_dual_clip": 3.0},
        "rollout": {"logp_gap_limit": 99.0},
        "training": {"inner_epochs": 2},
    },
    {
        "reward": {"functions": {"test_options.brevity": 0.5}},
        "hint": {"tokens": 2, "loss": "importance"},
        "kd": {"estimator": "exact", "alpha_end": 3.0},
        "downsample": {"method": "max_variance"},
        "advantage": {"scale": "beta", "group": "all"},
        "loss": {"normalization": "tokens", "beta": 0.05, "importance_cap": 1.5},
        "rollout": {"sampling_rounds": 2, "truncated": "mask", "logp_gap_limit": 99.0},
        "training": {"inner_epochs": 2, "update_order": "large_first"},
    },
    {
        "algorithm": "kdrl",
        "hint": {"tokens": 3, "loss": "masked"},
        "kd": {"placement": "objective", "estimator": "k2"},
        "training": {"mini_batches": 2},
        "loss": {"kind": "gspo", "normalization": "sequence", "logp_temperature": "one"},
        "rollout": {"temperature": 0.7, "logp_gap_limit": 99.0},
    },
    {
        "algorithm": "grpo",
        "grpo": {"model": "large"},
        "advantage": {"scale": "std"},
        "loss": {"normalization": "sequence", "beta": 0.05, "old_logps": "engine"},
        "rollout": {"logp_gap_limit": 99.0},
    },
]


def two_steps(settings: dict) -> list[dict[str, list[dict[str, float]]]]:
    out = []
    for changes in MANY:
        config = Config(**merged(settings, changes))
        trainer = Trainer(config, load_inputs(config), torch.device("cpu"), FakeGrader())
        trainer.engine = trainer.generation.engine = FakeEngine()
        out.append([trainer.step(number)[0] for number in (1, 2)])
    return out


def two_steps_of_a_process(rank: int, folder: str, settings: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    numbers = two_steps(settings)
    if rank == 0:
        torch.save(numbers, f"{folder}/numbers.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_do_what_one_does(settings, make_trainer, tmp_path):
    settings["training"]["tokens_per_micro_batch"] = 16  # processes have different numbers of them
    make_trainer()  # joins this process to a group of its own
    alone = two_steps(settings)
    spawn(two_steps_of_a_process, str(tmp_path), settings, processes=2)
    together = torch.load(tmp_path / "numbers.pt")
    for mine, theirs in zip(alone, together, strict=True):
        for one, two in zip(mine, theirs, strict=True):
            assert one.keys() == two.keys()
            for key in one:
                if not key.startswith(("time/", "tokens_per_second", "padding/")):
                    # Adam makes whole steps of gradients that are rounding alone; a ratio is the
                    # exponential of what comes of it, the largest most of all.
                    tolerance = 2e-3 if key.startswith("ratio/") else 2e-4
                    assert math.isclose(one[key], two[key], rel_tol=tolerance, abs_tol=1e-5), key
