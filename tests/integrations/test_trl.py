"""patch_trl(): TRL's trainers with and without the patch."""

import zlib
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fake_trl import B, FakeTrainer, T, padded_batch, trl_inputs
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from codistill_kernels.integrations.trl import TokenLoss, is_loss_of_tokens, patch_trl

trl = pytest.importorskip("trl", reason="TRL is not installed")

pytestmark = pytest.mark.usefixtures("single_thread")  # faster with small models
ZERO3 = "transformers.integrations.deepspeed.is_deepspeed_zero3_enabled"

# --- the loss ----------------------------------------------------------------------------------

# Arguments of TRL that cover every token-level loss and every term.
LOSSES = {
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo": dict(loss_type="dapo"),
    "luspo": dict(loss_type="luspo"),
    "sapo": dict(loss_type="sapo"),
    "cispo": dict(loss_type="cispo", epsilon_high=1.2),
    "cispo below 1": dict(loss_type="cispo", epsilon_high=0.3),
    "delta": dict(loss_type="dapo", delta=1.35),
    "entropy bonus": dict(loss_type="dapo", entropy_coef=0.2),
    "adaptive entropy": dict(loss_type="grpo", entropy_coef=0.2, adaptive_entropy=0.4),
    "adaptive entropy, none now": dict(loss_type="grpo", entropy_coef=0.2, adaptive_entropy=0.6),
    "KL": dict(loss_type="dr_grpo", beta=0.3),
    "KL, no bias correction": dict(loss_type="bnpo", beta=0.3, has_bias_correction=False),
    "importance sampling": dict(loss_type="sapo", is_corrected=True),
    "all": dict(loss_type="dapo", delta=1.35, beta=0.3, entropy_coef=0.2, is_corrected=True),
}


@pytest.mark.parametrize("variant", ["", "tools", "advantages of tokens", "first step"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_tokens_is_that_of_trl(name, variant):
    settings, case = LOSSES[name], padded_batch()
    generator = torch.Generator().manual_seed(1)
    inputs = trl_inputs(case, is_corrected=settings.get("is_corrected", False))
    inputs["ref_per_token_logps"] = case["old_logps"] - torch.rand(B, T, generator=generator)
    if variant == "tools":
        inputs["tool_mask"] = (torch.rand(B, T, generator=generator) < 0.7).long()
    elif variant == "advantages of tokens":
        inputs["advantages"] = torch.randn(B, T, generator=generator).double()
    elif variant == "first step":
        del inputs["old_per_token_logps"]
    trainer = FakeTrainer(case["logps"], case["entropy"], **settings)
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 3, 6
    trainer.accelerator.num_processes = 2
    ours = TokenLoss(trainer, inputs)  # before TRL adapts its entropy coefficient
    theirs = trainer.compute_loss(trainer, None, inputs)
    logps, entropy = (case[key][case["mask"]] for key in ("logps", "entropy"))
    ours = ours(logps, entropy, torch.arange(len(logps))).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    for key in ("logps", "entropy"):
        expected, got = (
            torch.autograd.grad(loss, case[key], retain_graph=True, materialize_grads=True)[0]
            for loss in (theirs, ours)
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def trainer_that_is(kind=trl.GRPOTrainer, **changes) -> object:
    """A trainer of TRL's class with the settings of a FakeTrainer."""
    trainer = object.__new__(kind)
    vars(trainer).update(vars(FakeTrainer(None, None, loss_type="dapo")) | changes)
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss_type="vespo"),
        dict(importance_sampling_level="sequence"),
        dict(top_entropy_quantile=0.5),
        dict(off_policy_mask_threshold=0.1),
        dict(model=SimpleNamespace(training=False)),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_no_loss_of_tokens(changes):
    assert is_loss_of_tokens(trainer_that_is())
    assert not is_loss_of_tokens(trainer_that_is(**changes))


def test_zero3_is_left_to_log_probabilities(monkeypatch):
    monkeypatch.setattr(ZERO3, lambda: True)
    assert not is_loss_of_tokens(trainer_that_is())


def test_a_subclass_that_changes_log_probabilities_gets_its_own_gradient():
    class Scaled(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *arguments, **options):
            raise NotImplementedError

    assert not is_loss_of_tokens(trainer_that_is(Scaled))


# --- the head ----------------------------------------------------------------------------------


def tiny(**settings) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **settings))


def scored(model: nn.Module, outputs: tuple, *, is_patched: bool, has_labels: bool = True):
    """Output of TRL's fused head on some labels, and the gradients of its sum."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    input_ids = torch.randint(2, 32, (3, 8), generator=torch.Generator().manual_seed(3))
    labels = input_ids.clone()
    labels[:, : 4 if has_labels else 8] = -100
    with patch_trl() if is_patched else nullcontext():
        output = model(input_ids, labels=labels, fused_lm_head=True)
        entropy = 0.0 if output.entropy is None else output.entropy.sum()
        (output.log_probs.sum() + 0.3 * entropy).backward()
    return output, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same_head(make, outputs=("log_probs", "entropy"), **settings) -> None:
    (ours, ours_dp), (theirs, theirs_dp) = (
        scored(make(), outputs, is_patched=is_patched, **settings) for is_patched in (True, False)
    )
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for got, expected in zip(ours_dp, theirs_dp, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "settings",
    [{}, dict(final_logit_softcapping=3.0), dict(logit_scale=0.3), dict(tie_word_embeddings=True)],
    ids=["plain", "softcap", "scale", "tied"],
)
def test_head(settings):
    assert_same_head(lambda: tiny(**settings))


def test_head_with_a_bias():
    def make():
        model = tiny()
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 32))
        return model

    assert_same_head(make)


def test_nothing_to_score_is_a_loss_of_zero():
    assert_same_head(tiny, has_labels=False)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_left_to_trl(scale):
    assert_same_head(lambda: tiny(logit_scale=scale))


def test_outputs_that_only_trl_has():
    outputs = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
    assert_same_head(tiny, outputs)


def test_entropy_is_none_unless_asked_for():
    output, _ = scored(tiny(), ("log_probs",), is_patched=True)
    assert output.entropy is None


def test_zero3_gathers_the_head_in_both_passes(monkeypatch):
    """Partitioned weights are empty outside of TRL's context."""

    def make():
        model = tiny()
        model.lm_head.weight.requires_grad_(False)  # autograd would miss DeepSpeed's hooks
        return model

    outputs = ("log_probs", "entropy")
    _, expected = scored(make(), outputs, is_patched=True)
    model, entered = make(), []
    weight = model.lm_head.weight
    whole, weight.data = weight.data, torch.empty(0)

    @contextmanager
    def gather(*parameters):
        assert parameters[0] is weight
        entered.append(True)
        weight.data = whole
        yield
        weight.data = torch.empty(0)

    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", gather)
    monkeypatch.setattr(ZERO3, lambda: True)
    _, got = scored(model, outputs, is_patched=True)
    assert len(entered) == 2 and not weight.numel()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- the patch ---------------------------------------------------------------------------------


def test_patch_is_undone_and_never_doubled():
    from trl.trainer import utils

    names = ("_ChunkedLogProbFunction", "_use_triton")
    before = [getattr(utils, name) for name in names] + [trl.GRPOTrainer._compute_loss]
    with patch_trl():
        patched = utils._ChunkedLogProbFunction
        patch_trl().close()
        assert utils._ChunkedLogProbFunction is patched is not before[0]
    assert [getattr(utils, name) for name in names] + [trl.GRPOTrainer._compute_loss] == before


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.15.2")
    with pytest.raises(ImportError, match=r"needs trl 1\.16\.\*, found 1.15.2"):
        patch_trl()


# --- whole trainings ---------------------------------------------------------------------------

DEMO = Path(__file__).parents[2] / "demo" / "small"
# Every loss type, both in one pass and with TRL's loss from log-probabilities.
TRAININGS = {
    "dapo": dict(loss_type="dapo"),
    "grpo, KL, delta": dict(loss_type="grpo", beta=0.04, delta=1.5),
    "bnpo, KL, no bias correction": dict(  # this KL amplifies rounding errors
        loss_type="bnpo", beta=0.04, use_bias_correction_kl=False, learning_rate=0.01
    ),
    "dr_grpo, entropy bonus": dict(loss_type="dr_grpo", entropy_coef=0.01),
    "cispo": dict(loss_type="cispo", epsilon_high=1.5),
    "sapo": dict(loss_type="sapo"),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence"),
    "vespo": dict(loss_type="vespo"),
    "grpo, sequence, off-policy mask": dict(
        loss_type="grpo", importance_sampling_level="sequence", off_policy_mask_threshold=0.01
    ),
    "dapo, top entropy": dict(loss_type="dapo", top_entropy_quantile=0.5),
}


def reward(completions: list[str], **_) -> list[float]:
    """Rewards that are spread about evenly, whatever the texts say."""
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]


def train(kind: str, folder: Path, *, is_patched: bool, peft_config=None, **settings) -> list[dict]:
    """TRL's log of four steps: two generations, with two optimizer steps on each."""
    problems = [f"{a}+{3 * a % 90 + 10}+{7 * a % 90 + 10}=" for a in range(10, 42)]
    options = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no")
    options |= dict(per_device_train_batch_size=8, num_generations=4, gradient_accumulation_steps=2)
    options |= dict(num_iterations=2, max_completion_length=12, temperature=0.9)
    # SGD, because the first steps of Adam would divide rounding errors by themselves.
    options |= dict(optim="sgd", learning_rate=0.05, lr_scheduler_type="constant")
    options |= dict(output_dir=str(folder), max_steps=4, logging_steps=1, seed=3)
    args = getattr(trl, f"{kind}Config")(**options | settings)
    with patch_trl() if is_patched else nullcontext():
        trainer = getattr(trl, f"{kind}Trainer")(
            AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32),
            reward,
            args,
            train_dataset=Dataset.from_dict({"prompt": problems}),
            processing_class=AutoTokenizer.from_pretrained(DEMO),
            peft_config=peft_config,
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(kind: str, folder: Path, **settings) -> None:
    theirs, ours = (
        train(kind, folder, is_patched=is_patched, **settings) for is_patched in (False, True)
    )
    for expected, got in zip(theirs, ours, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3, abs=1e-6)
        for key in expected.keys() - {"loss", "grad_norm", "step_time"}:  # metrics are TRL's
            assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", TRAININGS)
def test_training(name, tmp_path):
    assert_same_training("GRPO", tmp_path, **TRAININGS[name])


def test_training_of_rloo(tmp_path):
    assert_same_training("RLOO", tmp_path)


def test_training_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    assert_same_training("GRPO", tmp_path, peft_config=config, learning_rate=1.0)
