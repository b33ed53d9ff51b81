"""A sweep's folder: where every study and the results lie, and how far each point has come."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import read_json, read_toml, write_json, write_text
from neurondrift.study.sweep.settings import Sweep, read_sweep

State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a point has come: what it is doing, with its progress in words, since when (seconds of the epoch), and
    what it ended with; `code` as a command's exit code."""

    state: State = "waiting"
    stage: str = ""
    progress: str = ""
    message: str = ""
    code: int | None = None
    tries: int = 0
    began: float = 0.0
    seconds: float = 0.0
    process: int = 0
    host: str = ""


class SweepFolder:
    """Where everything of a sweep lies."""

    CONFIGURATION, POINTS, SHARED, LOGS, RESULTS, STATES = (
        "sweep.toml",
        "points",
        "shared",
        "logs",
        "results",
        ".neurondrift",
    )

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def configuration(self) -> Path:
        return self.root / self.CONFIGURATION

    @property
    def shared(self) -> Path:
        return self.root / self.SHARED

    @property
    def results(self) -> Path:
        return self.root / self.RESULTS

    @property
    def table(self) -> Path:
        return self.results / "sweep.parquet"

    @property
    def results_file(self) -> Path:
        return self.results / "sweep_results.json"

    @property
    def report(self) -> Path:
        return self.results / "sweep_report.txt"

    def study(self, name: str) -> Path:
        return self.root / self.POINTS / name

    def log(self, name: str) -> Path:
        return self.root / self.LOGS / f"{name}.log"

    def status(self, name: str) -> Status:
        """How far a point has come; one that was never begun, or whose file is damaged, waits."""
        try:
            content = read_json(self._state(name))
            known = {field.name for field in fields(Status)}
            return Status(**{key: value for key, value in content.items() if key in known})
        except (ArtifactError, TypeError, AttributeError):
            return Status()

    def set_status(self, name: str, status: Status, **changes: object) -> Status:
        """Write how far a point has come: the status with what has changed."""
        status = replace(status, **changes)  # type: ignore[arg-type]
        write_json(self._state(name), asdict(status))
        return status

    def _state(self, name: str) -> Path:
        return self.root / self.STATES / f"point.{name}.json"


def locate(where: Path, output_dir: Path | None) -> tuple[Sweep, SweepFolder]:
    """The sweep that a file or a sweep's folder names, and its folder.

    Parameters
    ----------
    where
        A sweep file, or the folder of a sweep that was begun.
    output_dir
        The sweep's folder; default: a folder of the sweep's name in the current one.

    Raises
    ------
    ConfigError
        As `read_sweep`; a folder that holds another sweep or a study.
    ArtifactError
        A folder in which no sweep was begun.
    """
    if where.is_dir():
        if output_dir is not None and output_dir.resolve() != where.resolve():
            raise ConfigError(
                "A sweep's folder is its own --output-dir", received=str(output_dir), fix="leave --output-dir out"
            )
        folder = SweepFolder(where)
        if not folder.configuration.exists():
            raise ArtifactError(
                "No sweep was begun in this folder",
                received=str(where),
                allowed="a sweep file, or a folder with a sweep.toml",
                fix="neurondrift sweep SWEEP.toml",
            )
        return read_sweep(folder.configuration), folder
    sweep = read_sweep(where)
    folder = SweepFolder(output_dir or Path(sweep.name))
    if (folder.root / "study.toml").exists():
        raise ConfigError(
            "The output folder holds a study", received=str(folder.root), fix="choose another --output-dir"
        )
    if folder.configuration.exists() and (standing := read_toml(folder.configuration).get("name")) != sweep.name:
        raise ConfigError(
            f"The output folder holds another sweep: {standing}",
            received=f"{sweep.name}, --output-dir {folder.root}",
            fix="choose another --output-dir",
        )
    return sweep, folder


def write_configuration(sweep: Sweep, folder: SweepFolder) -> None:
    """`sweep.toml`, from which `neurondrift sweep FOLDER` goes on."""
    text = sweep.to_toml()
    if not folder.configuration.exists() or folder.configuration.read_text(encoding="utf-8") != text:
        write_text(folder.configuration, text)
