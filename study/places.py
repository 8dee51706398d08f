"""Where the files of a study are: in the repository, or in a folder of one's own."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Folders, and the page of the report. By default those of the study that is committed."""

    results: Path = Path("bench/results/study")
    """TASK/METHOD/seed_K.json: the numbers of each run."""
    runs: Path = Path("runs/study")
    """The runs themselves, with their models, and what they printed."""
    page: Path = Path("docs/study.md")
    pictures: Path = Path("docs/study")

    @classmethod
    def within(cls, folder: Path) -> "Places":
        """All in one folder: a study of one's own leaves the committed one as it is."""
        names = "results", "runs", "study.md", "pictures"
        return cls(*(folder / name for name in names))
