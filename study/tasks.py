"""The tasks: two models, training problems and held-out sets for each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from study import problems
from study.methods import EPOCHS

HERE = Path(__file__).parent
DATA = Path("runs/study/data")
TRAINING_SEED = 2


@dataclass(frozen=True)
class Task:
    name: str
    small: Path
    large: Path
    learning_rates: dict[str, float]
    """Peak learning rate of each model."""
    write_data: Callable[[int], Path]
    """Writes the held-out sets, which the task's configuration names, and so many training
    problems; the file of the latter. Equal numbers give equal files."""

    @property
    def config(self) -> Path:
        """What all methods share."""
        return HERE / f"{self.name}.yaml"


def write_words(num_problems: int) -> Path:
    """The data files of the task words."""
    folder, held_out = DATA / "words", problems.held_out()
    for name, members in held_out.items():
        problems.write(members, folder / f"{name}.jsonl")
    banned = problems.held_out_texts()
    training = problems.make_problems(num_problems, TRAINING_SEED, problems.TRAINING, banned)
    file = folder / f"train_{num_problems}.jsonl"
    problems.write(training, file)
    return file


WORDS = Task(
    "words",
    small=HERE / "models/small",
    large=HERE / "models/large",
    learning_rates={"small": 1.5e-4, "large": 1e-4},
    write_data=write_words,
)

TASKS = {task.name: task for task in [WORDS]}


def training_problems(steps: int, prompts_per_step: int) -> int:
    """How many problems there are, so that a run passes over them `EPOCHS` times."""
    return max(prompts_per_step, steps * prompts_per_step // EPOCHS)
