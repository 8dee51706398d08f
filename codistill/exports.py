"""Models in Hugging Face format: a folder for each, with its tokenizer and its model card."""

import shutil
from pathlib import Path
from typing import Any

from codistill import distributed, files
from codistill.model.policy import Policy, export
from codistill.output.model_card import Cards


def export_models(policies: dict[str, Policy], tokenizer: Any, folder: Path, cards: Cards) -> None:
    """Write each model to folder/name; the folder has this name once everything is in it.

    Collective: the first process writes.
    """
    first = distributed.is_first()
    unfinished = folder.with_name(f"unfinished_{folder.name}")
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
    for name, policy in policies.items():
        export(policy, tokenizer, unfinished / name, write=first)
        if first:
            files.write_text(unfinished / name / "README.md", cards.text(name))
    if first:
        files.finish_folder(unfinished, folder)
