"""Log-probabilities in a model's forward pass against those of the model's own logits."""

from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import spawn
from torch import nn
from torch.distributed.fsdp import fully_shard

from codistill_kernels import linear_logps
from codistill_kernels.integrations.transformers import linear_head, logps_instead_of_logits

pytestmark = pytest.mark.usefixtures("single_thread")  # faster with small models
B, T, V = 2, 7, 37
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.3,  # logits far from uniform, so that a wrong scale is noticed
    pad_token_id=0,
)
# Families, some of which change their logits, and settings that make this visible in a tiny model.
MODELS = {
    "Qwen2": {},
    "Qwen2 tied": dict(tie_word_embeddings=True),
    "Qwen3": {},
    "Llama": {},
    "Gemma2": dict(final_logit_softcapping=3.0),
    "Gemma3": dict(final_logit_softcapping=3.0),  # Gemma3TextConfig of Gemma3ForCausalLM
    "RecurrentGemma": dict(logits_soft_cap=3.0, lru_width=32, w_init_variance_scale=1.0),
    "Granite": dict(logits_scaling=4.0),
    "Cohere": dict(logit_scale=0.3),
    "FalconH1": dict(lm_head_multiplier=0.4, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
    "Phi": {},  # has a bias
}


def tiny(name: str) -> transformers.PreTrainedModel:
    kind = name.split()[0]
    config_name = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_name)(**SIZES | MODELS[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        nn.init.normal_(bias)
    return model


def batch() -> dict:
    """Inputs with padding on the left, and labels for the last tokens alone."""
    input_ids = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones(B, T, dtype=torch.long)
    attention_mask[1, :2] = 0
    labels = input_ids.clone()
    labels[:, :3] = -100
    return dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def eager(model: nn.Module, inputs: dict, temperature: float) -> tuple:
    """Log-probabilities and entropy [B, T - 1] of the model's own logits."""
    labels = inputs["labels"][:, 1:]
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1] / temperature
    all_logps = logits.log_softmax(-1)
    keep = labels != -100
    logps = all_logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    return torch.where(keep, logps, 0.0), torch.where(keep, entropy, 0.0)


def assert_same_as_eager(model: nn.Module, temperature: float = 0.7) -> None:
    inputs, results = batch(), []
    for is_patched in (False, True):
        if is_patched:
            with logps_instead_of_logits(model, temperature=temperature, return_entropy=True):
                logps, entropy = model(**inputs)
        else:
            logps, entropy = eager(model, inputs, temperature)
        model.zero_grad()
        (logps - 0.3 * entropy).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logps, entropy, gradients))
    (logps, entropy, gradients), (our_logps, our_entropy, ours) = results
    torch.testing.assert_close(our_logps, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_entropy, entropy, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_models_own_logits(name):
    assert_same_as_eager(tiny(name))


def test_without_labels_the_model_is_as_before():
    model = tiny("Qwen2").eval()
    inputs = batch()
    del inputs["labels"]
    options = dict(max_new_tokens=4, do_sample=False)
    before, logits = model.generate(**inputs, **options), model(**inputs).logits
    with logps_instead_of_logits(model):
        assert torch.equal(model.generate(**inputs, **options), before)
        assert torch.equal(model(**inputs).logits, logits)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def test_no_entropy_unless_asked_for():
    model = tiny("Qwen2")
    with logps_instead_of_logits(model):
        assert model(**batch()).entropy is None


def test_head_by_hand():
    """`linear_head` gives the arguments of the functions that start from hidden states."""
    model, inputs = tiny("Gemma2"), batch()
    logps, _ = eager(model, inputs, 1.0)
    labels = inputs.pop("labels")[:, 1:]
    hidden_states = model.base_model(**inputs).last_hidden_state[:, :-1]
    ours = linear_logps(hidden_states, token_ids=labels, **linear_head(model))
    torch.testing.assert_close(ours, logps, rtol=1e-5, atol=1e-5)


def test_autocast_rounds_operands_alone():
    """Under autocast products are in bf16, and results are nearer to fp32 than the model's own."""
    model, inputs = tiny("Qwen2"), batch()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        hidden_states = model.base_model(inputs["input_ids"], inputs["attention_mask"])[0]
        logps, _ = eager(model, inputs, 1.0)
        with logps_instead_of_logits(model):
            ours = model(**inputs).logps
    weight = model.lm_head.weight.bfloat16()
    labels = inputs["labels"][:, 1:]
    rounded = hidden_states.bfloat16()[:, :-1].double() @ weight.double().T
    gold = rounded.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    gold = torch.where(labels == -100, 0.0, gold)
    assert (ours - gold).abs().max() < 1e-5 < 1e-3 < (logps - gold).abs().max()


# --- adapters ----------------------------------------------------------------------------------


def with_lora(**settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**dict(r=4, init_lora_weights=False) | settings)
    torch.manual_seed(2)
    return peft.get_peft_model(tiny("Qwen2"), config)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["body", "head"])
def test_lora(targets):
    assert_same_as_eager(with_lora(target_modules=targets))


def test_several_adapters_of_the_head():
    model = with_lora(target_modules=["lm_head"])
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert_same_as_eager(model)


@pytest.mark.parametrize("is_merged", [False, True], ids=["switched off", "merged"])
def test_lora_that_is_not_beside_the_weight(is_merged):
    model = with_lora(target_modules=["q_proj", "lm_head"])
    with torch.no_grad(), ExitStack() as stack:
        if is_merged:
            model.merge_adapter()
        else:
            stack.enter_context(model.disable_adapter())
        expected, _ = eager(model, batch(), 1.0)
        stack.enter_context(logps_instead_of_logits(model))
        torch.testing.assert_close(model(**batch()).logps, expected, rtol=1e-5, atol=1e-5)


def test_head_that_is_saved_whole():
    model = with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    assert_same_as_eager(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(use_dora=True), "plain LoRA"), (dict(lora_dropout=0.5), "without dropout")],
    ids=["DoRA", "dropout"],
)
def test_other_adapters_of_the_head_are_refused(settings, message):
    model = with_lora(target_modules=["lm_head"], **settings)
    with pytest.raises(ValueError, match=message):
        logps_instead_of_logits(model)


# --- sharded models ----------------------------------------------------------------------------


def check_fsdp(rank: int, file: str) -> None:
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for has_own_group in (False, True):  # of the head; if not, it belongs to the root's
        inputs, model, whole = batch(), tiny("Qwen2"), tiny("Qwen2")
        eager(whole, inputs, 0.7)[0].sum().div(2).backward()  # FSDP averages over the two
        for module in [*model.model.layers, *([model.lm_head] if has_own_group else []), model]:
            fully_shard(module, reshard_after_forward=True)
        logps_instead_of_logits(model, temperature=0.7)
        mine = {key: value[rank : rank + 1] for key, value in inputs.items()}
        model(**mine).logps.sum().backward()
        for (name, ours), gold in zip(model.named_parameters(), whole.parameters(), strict=True):
            error = (ours.grad.full_tensor() - gold.grad).norm() / gold.grad.norm()
            assert error < 1e-4, (name, error)


def test_fsdp_gathers_the_head_and_sums_its_gradient(tmp_path):
    spawn(check_fsdp, str(tmp_path / "rendezvous"), processes=2)


def test_hooks_of_the_head_take_place():
    """The weight is gathered as in ZeRO-3, by hooks before and after the head's module."""
    model, inputs = tiny("Qwen2"), batch()
    expected, _ = eager(model, inputs, 1.0)
    whole, model.lm_head.weight.data = model.lm_head.weight.data, torch.empty(0)

    def gather(module, *_):
        module.weight.data = whole

    model.lm_head.register_forward_pre_hook(gather)
    with torch.no_grad(), logps_instead_of_logits(model):
        torch.testing.assert_close(model(**inputs).logps, expected, rtol=1e-5, atol=1e-5)


# --- refusals ----------------------------------------------------------------------------------


def test_a_head_that_multiplies_in_its_own_way_is_refused():
    class Int8Linear(nn.Linear):
        def forward(self, x):
            return x

    model = tiny("Qwen2")
    model.lm_head = Int8Linear(32, V)
    with pytest.raises(ValueError, match="lm_head must be an nn.Linear.*Int8Linear"):
        linear_head(model)


def test_a_quantized_weight_is_refused():
    model = tiny("Qwen2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), False)
    with pytest.raises(ValueError, match="not quantized.*float8"):
        linear_head(model)


def test_a_model_that_masks_its_logits_is_refused():
    model = tiny("Qwen2")
    model.config.unpadded_vocab_size = 30
    with pytest.raises(ValueError, match="only scales and softcaps its logits, got qwen2"):
        linear_head(model)


def test_another_module_is_refused():
    with pytest.raises(ValueError, match="model must be a causal language model.*Linear"):
        linear_head(nn.Linear(2, 2))


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.\*, found 4.57.1"):
        logps_instead_of_logits(tiny("Qwen2"))
