"""The training loop. `Trainer.step` is the algorithm, from top to bottom."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from codistill import distributed
from codistill.batch import TokenBatch
from codistill.config import Config, require
from codistill.engine import EngineSpec, RestartingEngine, temporary_engine
from codistill.evaluation import answer
from codistill.grading import Grader
from codistill.inputs import Inputs
from codistill.learner import Learner
from codistill.losses import make_policy_loss
from codistill.model.loading import load_policy
from codistill.model.lora import without_adapters
from codistill.model.policy import DTYPES, Policy, freeze
from codistill.objective import make_objectives
from codistill.output.metrics import StepMetrics
from codistill.output.throughput import peak_flops
from codistill.rollout import Generation, Rollouts
from codistill.scoring import (
    Scored,
    alpha_at,
    assign_credit,
    check_gap,
    check_numbers,
    divergences,
    engine_weights,
    token_logps,
)


def engine_spec(config: Config, inputs: Inputs, name: str, device: torch.device) -> EngineSpec:
    """What an engine of the model `name` must know."""
    rollout = config.rollout
    return EngineSpec(
        path=config.model(name).path,
        vocab_size=len(inputs.tokenizer),
        end_token_ids=inputs.end_token_ids,
        max_model_tokens=rollout.max_prompt_tokens + rollout.max_completion_tokens,
        dtype=DTYPES[config.training.dtype],
        device=device,
        kv_cache_gib=rollout.kv_cache_gib,
        stop=inputs.stop,
        sleeps=rollout.sleep,
        tensor_parallel=rollout.tensor_parallel,
        servers=tuple(server.rstrip("/") for server in rollout.servers),
        sends=distributed.is_first(),
        timeout=config.distributed.timeout,
        path_key=f"{name}.path",
    )


class Trainer:
    """The models of a run, and the engine of the one that writes the rollouts.

    codistill and kdrl: the small model writes, the large one scores; grpo: one model does it all.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        device: torch.device,
        grader: Grader,
    ) -> None:
        self.config, self.inputs, self.device, self.grader = config, inputs, device, grader
        self.total_steps = config.total_steps(len(inputs.problems))
        self.mesh = distributed.shard_mesh(config.distributed.replicas, device)
        # The engine comes first: vLLM measures free memory while it starts.
        self.engine = RestartingEngine(
            config.rollout.engine,
            engine_spec(config, inputs, config.writer, device),
            weights=lambda: self.policies[config.writer].full_weights(),
        )
        self.learners = {name: self.make_learner(name) for name in config.trained}
        self.frozen = {
            name: freeze(self.load_policy(name))
            for name in config.loaded
            if name not in config.trained
        }
        self.policies = {n: learner.policy for n, learner in self.learners.items()} | self.frozen
        for name, policy in self.policies.items():
            exact = config.has_teacher and config.kd.chosen_estimator == "exact"
            expected = f"an estimator of sampled tokens: the lm_head of {name}.path has a bias"
            require(not (exact and policy.has_bias), "kd.estimator", "exact", expected)
        self.references = {name: freeze(self.load_policy(name)) for name in config.references}
        self.generation = Generation(
            config,
            inputs,
            self.engine,
            grader,
            hinter=self.policies.get("large"),
        )

    def load_policy(self, name: str) -> Policy:
        model, vocab_size = self.config.model(name), len(self.inputs.tokenizer)
        return load_policy(
            f"{name}.path",
            model.path,
            self.config.training,
            vocab_size,
            self.device,
            lora=model.lora,
            mesh=self.mesh,
        )

    def make_learner(self, name: str) -> Learner:
        return Learner(
            name,
            self.load_policy(name),
            make_policy_loss(self.config, name),
            self.config.optimizer,
            learning_rate=self.config.model(name).learning_rate,
            total_steps=self.total_steps,
            optimizer_steps=self.config.optimizer_steps,
            states_on_host=self.config.training.offload == "optimizer",
        )

    def step(self, step: int) -> tuple[dict[str, float], Rollouts, Scored]:
        """Step `step`, from 1: generate, score, train, sync the engine.

        Raises:
            SyncError: the engine's log-probabilities are not the trainer's; nothing was trained.
            EngineError, RewardError: the engine, a reward function or the grading failed.
            Failure: any other error. It names the phase.
            FloatingPointError: a model's log-probabilities are not finite, or gradients have not
                been for training.max_skipped optimizer steps in a row.
        """
        metrics = StepMetrics(self.device)
        with metrics.timer("time/step"):
            with metrics.timer("time/rollout"):
                rollouts = self.generation.rollouts(step, metrics)
                self.engine.sleep()
            with metrics.timer("time/score"):
                scored = self.score(step, rollouts, metrics)
            if self.config.training.update_order == "large_first":
                self.update("large", step, rollouts, scored, metrics)
                with metrics.timer("time/score"):
                    scored = self.score_again(step, rollouts, scored)
                self.update("small", step, rollouts, scored, metrics)
            else:
                for name in self.learners:
                    self.update(name, step, rollouts, scored, metrics)
            with metrics.timer("time/sync"):
                self.engine.wake_up()
                self.engine.sync()
        return self.finish(metrics.reduce()), rollouts, scored

    def score(self, step: int, rollouts: Rollouts, metrics: StepMetrics) -> Scored:
        """Log-probabilities of all models, effective reward, down-sampling, advantages."""
        config, tokens = self.config, rollouts.tokens
        everything = self.batches(rollouts, range(len(rollouts)))
        logps = {name: self.logps(p, everything, tokens) for name, p in self.policies.items()}
        check_numbers(logps)
        sampled = logps[config.writer]  # as the engine sampled: at its temperature
        if (temperature := config.rollout.temperature) != config.logp_temperature:
            writer = self.policies[config.writer]
            sampled = token_logps(writer, everything, tokens, temperature)
        check_gap(config, rollouts, sampled, self.engine.name, metrics)
        for batch in everything:
            padded = batch.packing.padded_tokens
            metrics.mean("padding/attention", padded - batch.input_ids.numel(), padded)
        kl = self.divergences(everything, tokens)
        terms = dict(step=step, total_steps=self.total_steps)
        credit = assign_credit(config, rollouts, logps, kl=kl, **terms)
        kept = credit.kept.tolist()
        size = len(kept) // config.training.mini_batches
        parts = [kept[start : start + size] for start in range(0, len(kept), size)]
        mini_batches = [self.batches(rollouts, part) for part in parts]
        batches = list(chain.from_iterable(mini_batches))
        references = self.reference_logps(batches, tokens)
        if references:
            check_numbers({f"reference {name}": values for name, values in references.items()})
        scored = Scored(
            credit,
            mini_batches,
            logps,
            teacher_logps=logps["large"] if config.has_teacher else None,
            reference_logps=references,
            importance_weights=engine_weights(config, rollouts, sampled),
        )
        for policy in (*self.frozen.values(), *self.references.values()):
            policy.release()
        if credit.kd_rewards is not None:
            metrics.mean_of("reward/kd", credit.kd_rewards)
            metrics.mean_of("reward/effective", credit.effective_rewards)
        metrics.mean_of("reward/kept_accuracy", rollouts.accuracy[kept])
        return scored

    def score_again(self, step: int, rollouts: Rollouts, scored: Scored) -> Scored:
        """The KD term and what follows from it, with the large model as it is now.

        The rollouts kept stay: the large model has been trained on them.
        """
        everything, tokens = self.batches(rollouts, range(len(rollouts))), rollouts.tokens
        teacher = self.logps(self.policies["large"], everything, tokens)
        check_numbers({"large": teacher})
        credit = assign_credit(
            self.config,
            rollouts,
            scored.logps | {"large": teacher},
            step=step,
            total_steps=self.total_steps,
            kl=self.divergences(everything, tokens),
            kept=scored.credit.kept,
        )
        return replace(scored, credit=credit, teacher_logps=teacher)

    def divergences(self, batches: Sequence[TokenBatch], tokens: int) -> Tensor | None:
        """[tokens] KL(small, large) before each token, where the KD reward is exact."""
        if not self.config.has_teacher or self.config.kd.chosen_estimator != "exact":
            return None
        small, large = self.policies["small"], self.policies["large"]
        return divergences(small, large, batches, tokens, self.config.logp_temperature)

    def reference_logps(self, batches: Sequence[TokenBatch], tokens: int) -> dict[str, Tensor]:
        """[tokens] of each model that learns as it was before the first step, for loss.beta: from a
        copy, or from the model itself with its adapters off."""
        if not self.config.loss.beta:
            return {}
        logps = {}
        for name, learner in self.learners.items():
            with without_adapters(learner.policy.lm):
                reference = self.references.get(name, learner.policy)
                logps[name] = self.logps(reference, batches, tokens)
        return logps

    def logps(self, policy: Policy, batches: Sequence[TokenBatch], tokens: int) -> Tensor:
        """[tokens] at the temperature of training."""
        return token_logps(policy, batches, tokens, self.config.logp_temperature)

    def batches(self, rollouts: Rollouts, rows: Sequence[int]) -> list[TokenBatch]:
        return rollouts.batches(rows, self.config.training.tokens_per_micro_batch, self.device)

    def update(
        self, name: str, step: int, rollouts: Rollouts, scored: Scored, metrics: StepMetrics
    ) -> None:
        """The optimizer steps of a model on the kept rollouts."""
        learner = self.learners[name]
        with metrics.timer(f"time/update_{name}"):
            alpha = alpha_at(self.config, step, self.total_steps)
            objectives = make_objectives(self.config, name, rollouts, scored, alpha=alpha)
            updates = zip(scored.mini_batches, objectives, strict=True)
            for batches, objective in list(updates) * self.config.training.inner_epochs:
                learner.backward(
                    batches, objective, metrics, temperature=self.config.logp_temperature
                )
                learner.step(metrics)
                if learner.skipped_in_a_row >= self.config.training.max_skipped:
                    file = self.save_batch(name, step, rollouts, scored)
                    raise FloatingPointError(
                        f"the gradient of the {name} model was not finite in "
                        f"{learner.skipped_in_a_row} optimizer steps in a row; the last batch is "
                        f"in {file}"
                    )
        trained = chain.from_iterable(scored.mini_batches)
        tokens = sum(batch.input_ids.numel() for batch in trained)
        flops = learner.flops_per_token * tokens * self.config.training.inner_epochs
        metrics.total(f"flops/{name}", flops)

    def save_batch(self, name: str, step: int, rollouts: Rollouts, scored: Scored) -> Path:
        """Write down what this process trained the model `name` on in a step; the file."""
        kept = scored.credit.kept.cpu()
        rows = rollouts.rows(kept)
        folder = self.config.output_dir / self.config.name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"not_finite_{name}_step_{step}_rank_{dist.get_rank()}.safetensors"
        tensors = {
            "prompt_ids": rows.prompts.values,
            "prompt_cu_seqlens": rows.prompts.cu_seqlens,
            "completion_ids": rows.completions.values,
            "completion_cu_seqlens": rows.completions.cu_seqlens,
            "advantages": scored.credit.advantages[name].cpu()[kept],
        }
        save_file(tensors, file)
        return file

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out accuracy of the writer and, where evaluation.large says so, of a large model
        that learns: under the model's name the mean over all sets, under model/set that of a set
        which has a name."""
        config = self.config
        accuracy = {"step": step, **self.evaluate_with(self.engine, config.writer)}
        is_time = config.evaluation.large == "always" or step in (0, self.total_steps)
        if config.evaluates_large and is_time:
            accuracy |= self.evaluate_large()
        return accuracy

    def evaluate_large(self) -> dict[str, float]:
        """Accuracy of the large model, by an engine that lives for this evaluation only."""
        folder = self.config.output_dir / self.config.name
        self.engine.sleep()
        with temporary_engine(
            self.config.rollout.engine,
            engine_spec(self.config, self.inputs, "large", self.device),
            self.policies["large"].full_weights,
            log=folder / f"server_rank{distributed.rank()}.log",
        ) as engine:
            accuracy = self.evaluate_with(engine, "large")
        self.engine.wake_up()
        return accuracy

    def evaluate_with(self, engine: Any, model: str) -> dict[str, float]:
        """Accuracy of the engine's model, called `model`, as `evaluate` has it."""
        sets = {}
        for name, problems in self.inputs.held_out.items():
            answers = answer(
                engine,
                self.grader,
                self.inputs.text,
                problems,
                temperature=self.config.evaluation.temperature,
                max_tokens=self.config.rollout.max_completion_tokens,
                seed=self.config.seed,
            )
            sets[name] = answers.accuracy(len(problems))
        named = {f"{model}/{name}": accuracy for name, accuracy in sets.items() if name}
        return {model: sum(sets.values()) / len(sets), **named}

    def finish(self, numbers: dict[str, float]) -> dict[str, float]:
        """Add what is a function of reduced numbers; drop what was only needed for that."""
        # Where no token was in a loss, or none was the engine's, there was nothing to average.
        numbers.setdefault("rollout/logp_gap_mean", 0.0)
        peak = peak_flops(self.device)
        for name in self.learners:
            for statistic in ("mean", "square_mean", "clip_fraction", "kl"):
                numbers.setdefault(f"ratio/{name}_{statistic}", 0.0)
            mean, squares = numbers[f"ratio/{name}_mean"], numbers.pop(f"ratio/{name}_square_mean")
            numbers[f"ratio/{name}_ess"] = mean**2 / squares if squares else 0.0
            flops, seconds = numbers.pop(f"flops/{name}"), numbers[f"time/update_{name}"]
            if peak is not None:
                numbers[f"mfu/{name}"] = flops / (seconds * peak * dist.get_world_size())
        numbers["tokens_per_second"] = numbers.pop("rollout/tokens") / numbers["time/step"]
        return numbers
