"""python -m codistill export RUN [--step K] [--output DIR]

Write the models of a checkpoint in Hugging Face format, each with a model card, as the end of a run
does. Needs neither a GPU nor an engine; the run may still be going on.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from codistill import distributed
from codistill.config import Config, ConfigError, load_config, load_options, require
from codistill.config.base import CommandOptions, UserPath


class ExportOptions(CommandOptions):
    """Write the models of a checkpoint in Hugging Face format, each with a model card."""

    model_config = SettingsConfigDict(cli_prog_name="python -m codistill export")

    run: CliPositionalArg[UserPath] = Field(description="the folder of one run")
    step: int | None = Field(
        None, ge=0, description="export after this step; by default after the last checkpoint"
    )
    output: UserPath | None = Field(
        None, description="a folder that is not there yet; by default RUN/export/step_<k>"
    )


def main(arguments: list[str]) -> None:
    """Export the models of a checkpoint; print where they are."""
    options = load_options(ExportOptions, arguments)
    processes = distributed.world_size()
    require(processes == 1, "WORLD_SIZE", processes, "one process: export runs without torchrun")
    folder, output = options.run, options.output
    config = stored_config(folder)
    if output is not None:
        require(not output.exists(), "output", str(output), "a folder that is not there yet")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read before torch is; weights stay on the CPU
    import torch.distributed as dist

    from codistill.run import quiet_libraries

    quiet_libraries()
    distributed.start(config.distributed.timeout)
    try:
        target = export_run(config, folder, options.step, output)
    finally:
        dist.destroy_process_group()
    print("\n".join(str(target / name) for name in config.trained))


def export_run(config: Config, folder: Path, wanted: int | None, output: Path | None) -> Path:
    """Export the models after the step that is wanted; the folder they are in."""
    from codistill import checkpoint
    from codistill.exports import export_models
    from codistill.files import read_rows
    from codistill.model.pretrained import load_tokenizers
    from codistill.output.model_card import Cards

    step = chosen_step(folder / "checkpoints", wanted)
    with keys_of(folder):
        tokenizer = load_tokenizers(config)
        policies = load_policies(config, len(tokenizer))
    checkpoint.load_weights(folder / "checkpoints", step, policies)
    target = output or folder / "export" / f"step_{step}"
    cards = Cards(config, step, read_rows(folder / "evaluations.jsonl"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        export_models(policies, tokenizer, target, cards)
    except OSError as error:
        expected = f"a folder that can be written: {error}"
        raise ConfigError(f"output = {str(target)!r}: expected {expected}") from error
    return target


def stored_config(folder: Path) -> Config:
    """The configuration that a run was last started with."""
    path = folder / "config.yaml"
    require(path.is_file(), "run", str(folder), "the folder of a run, with config.yaml in it")
    with keys_of(folder):
        return load_config(["--config", str(path)])


@contextmanager
def keys_of(folder: Path) -> Iterator[None]:
    """Say a ConfigError about a key of the run's config.yaml as one about the run, which is all
    that this command is given."""
    try:
        yield
    except ConfigError as error:
        expected = f"a run of this version whose models are there: {folder / 'config.yaml'}"
        raise ConfigError(f"run = {str(folder)!r}: expected {expected}: {error}") from error


def chosen_step(folder: Path, wanted: int | None) -> int:
    """The step of the checkpoint to export: the one that is wanted, or the last good one.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    from codistill import checkpoint

    steps = checkpoint.steps_named(folder)
    require(bool(steps), "run", str(folder.parent), "a run with a checkpoint, there is none")
    if wanted is None:
        step, reasons = checkpoint.last_good(folder)
        assert step is not None, steps
        for bad, why in reasons.items():
            print(f"codistill: passed over {folder}/step_{bad}, which {why}", file=sys.stderr)
        return step
    known = ", ".join(map(str, sorted(steps)))
    require(wanted in steps, "step", wanted, f"the step of a checkpoint of the run: {known}")
    reason = checkpoint.damage(folder / f"step_{wanted}")
    require(reason is None, "step", wanted, f"a good checkpoint: step_{wanted} {reason}")
    return wanted


def load_policies(config: Config, num_tokens: int) -> dict:
    """The models that learned, as they were before the first step."""
    import torch

    from codistill.model.loading import load_causal_lm
    from codistill.model.lora import add_adapters
    from codistill.model.policy import Policy
    from codistill.model.pretrained import find_model

    policies = {}
    for name in config.trained:
        key, model = f"{name}.path", config.model(name)
        find_model(key, model.path)
        lm = load_causal_lm(model.path, dtype=torch.float32, key=key)
        if model.lora is not None:
            add_adapters(lm, key, model.path, model.lora)
        policies[name] = Policy(lm, vocab_size=num_tokens)
    return policies
