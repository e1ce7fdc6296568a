"""Write the report of a model to disk, and move an old one aside."""

import shutil
import time
from pathlib import Path

from nanochat.files import atomic_write, base_dir, free_name
from nanochat.report import plots
from nanochat.report.runs import logs_of_model, read_logs
from nanochat.report.sections import HEADING, overview_section, stage_section, summary_section


def generate(tag: str | None = None, hourly_price: float | None = None, folder: str | Path | None = None) -> Path:
    """Write the report of a model.

    Args:
        tag: name of the model; None takes the one that was trained or evaluated last.
        hourly_price: dollars an hour for the whole machine.
        folder: where the copy goes; None is the working folder.

    Returns:
        The path of the copy.

    Raises:
        UserError: where there is no log, or none of that model.
    """
    log_folder, report = base_dir() / "logs", base_dir() / "report"
    tag, logs = logs_of_model(read_logs(log_folder), tag, log_folder)
    report.mkdir(exist_ok=True)
    for old in (*report.glob("[0-9][0-9]-*.md"), *report.glob("[0-9][0-9]-*.png")):
        old.unlink()  # of stages that this report may not have
    try:
        pictures, note = plots.draw(logs, report), ""
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "PIL", "numpy"):
            raise
        pictures, note = {}, ("There are no plots, as matplotlib is not installed: `uv pip install '.[report]'` in the "
                              "project's folder installs it, then `python -m nanochat.report generate` again.\n")
    sections = {"overview": overview_section(tag, logs, hourly_price) + (f"\n{note}" if note else "")}
    sections |= {stage: stage_section(log, pictures.get(stage, [])) for stage, log in logs.items()}
    sections["summary"] = summary_section(logs)
    sections["summary"] += "".join(f"\n![Scores]({name})\n" for name in pictures.get("summary", []))
    for number, (name, text) in enumerate(sections.items()):
        with atomic_write(report / f"{number:02d}-{name}.md", "w") as file:
            file.write(text)
    whole = "\n".join(sections.values())
    with atomic_write(report / "report.md", "w") as file:
        file.write(whole)
    return _copy(whole, [name for names in pictures.values() for name in names], report, Path(folder or "."))


def _copy(text: str, pictures: list[str], report: Path, folder: Path) -> Path:
    """Copy the report into `folder`, its plots into report_files. A report.md that is not ours is moved aside first."""
    path, picture_folder = folder / "report.md", folder / "report_files"
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            ours = file.readline().startswith(HEADING)
        if not ours:
            path.rename(free_name(folder / "report.md.old"))
    for name in pictures:
        text = text.replace(f"]({name})", f"]({picture_folder.name}/{name})")
        with atomic_write(picture_folder / name) as file:
            file.write((report / name).read_bytes())
    with atomic_write(path, "w") as file:
        file.write(text)
    return path


def reset() -> Path | None:
    """Move the report under base_dir() aside, to a name with the time.

    Returns the new path, or None where there was no report.
    """
    report = base_dir() / "report"
    if not report.exists():
        return None
    return Path(shutil.move(str(report), str(free_name(report.with_name(f"report.{time.strftime('%Y%m%d-%H%M%S')}")))))
