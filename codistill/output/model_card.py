"""The model card (README.md) of an exported model, from a template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from codistill import versions
from codistill.config import Config
from codistill.config.changes import flatten
from codistill.downloads import HUB_NAME

MACHINE = ("name", "output_dir", "log", "distributed", "checkpoint")
"""Keys and sections that say where a run was, not what it computed."""
PACKAGES = ("codistill-grpo", *versions.PACKAGES)


@dataclass(frozen=True)
class Cards:
    """What the cards of a run's models are made of."""

    config: Config
    step: int
    """The step after which the models are exported."""
    evaluations: list[dict[str, Any]]
    """Rows of evaluations.jsonl, in any order."""

    def text(self, name: str) -> str:
        """The card of the model `name`. It holds no path of this machine."""
        environment = Environment(
            loader=PackageLoader("codistill.output"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False)
        config = self.config
        others = [other for other in config.loaded if other != name]
        return environment.get_template("model_card.md").render(
            header=header(config, name),
            config=config,
            name=name,
            step=self.step,
            model=public_name(config.model(name).path),
            partners={other: public_name(config.model(other).path) for other in others},
            settings=settings(config),
            accuracies=accuracies(self.evaluations, name, self.step),
            versions=versions.installed(PACKAGES),
        )


def header(config: Config, name: str) -> dict[str, Any]:
    """What the Hugging Face Hub reads of a card."""
    path = config.model(name).path
    base = {"base_model": path} if is_hub_name(path) else {}
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **base,
        "tags": ["codistill-grpo", config.algorithm, "reinforcement-learning"],
    }


def public_name(path: str) -> str:
    """A model's name on the Hub, or that of its folder."""
    return path if is_hub_name(path) else Path(path).resolve().name


def is_hub_name(path: str) -> bool:
    """Whether a model's path is a name on the Hub, and no folder, be it there still or not."""
    return HUB_NAME.fullmatch(path) is not None and not Path(path).is_dir()


def settings(config: Config) -> dict[str, Any]:
    """Dotted key -> value of what is not as by default; of a path its last part."""
    flat = flatten(config.model_dump(exclude_defaults=True))
    values = {key: without_folders(value) for key, value in flat.items()}
    paths = {f"{n}.path": public_name(config.model(n).path) for n in config.loaded}
    return {
        key: paths.get(key, value)
        for key, value in values.items()
        if key.partition(".")[0] not in MACHINE
    }


def without_folders(value: Any) -> Any:
    """The last part of a path, or of each path of a list; any other value as it is."""
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return value.name if isinstance(value, Path) else value


def accuracies(
    evaluations: list[dict[str, Any]], name: str, step: int
) -> dict[str, dict[int, float]]:
    """Held-out problems, "" or the name of a set -> step -> accuracy of the model `name`: before
    the first step, and at the last evaluation up to `step`."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(evaluations, key=lambda row: row["step"]):
        if row["step"] > step:
            continue
        for key, value in row.items():
            model, _, problems = key.partition("/")
            if model != name or value is None:
                continue
            before = {k: v for k, v in found.get(problems, {}).items() if k == 0}
            found[problems] = before | {row["step"]: value}
    return found
