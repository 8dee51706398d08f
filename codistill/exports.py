"""Models in Hugging Face format: a folder for each, with its tokenizer and its model card."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from codistill import files
from codistill.failures import first_alone
from codistill.model.lora import save_adapter
from codistill.model.policy import Policy, export
from codistill.output.model_card import Cards


def export_models(policies: dict[str, Policy], tokenizer: Any, folder: Path, cards: Cards) -> None:
    """Write each model to folder/name, and its adapter, if it has one, to folder/name_adapter; the
    folder has this name once everything is in it.

    Collective: the first process writes.
    """
    unfinished = folder.with_name(f"unfinished_{folder.name}")
    first_alone(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    for name, policy in policies.items():
        export(policy, tokenizer, unfinished / name)
        save_adapter(policy.lm, unfinished / f"{name}_adapter", policy.device)
        first_alone(partial(write_card, cards, name, unfinished / name))
    first_alone(lambda: files.finish_folder(unfinished, folder))


def write_card(cards: Cards, name: str, folder: Path) -> None:
    files.write_text(folder / "README.md", cards.text(name))
