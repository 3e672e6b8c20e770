"""Results in the W&B run of a trained run, by W&B's own interface: its summary gets them under ``eval/``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybridlm.config.run import RunConfig
from hybridlm.eval.results import Record
from hybridlm.runs.run_folder import RunFolder


def log_to_wandb(config: RunConfig, folder: RunFolder, records: Sequence[Record], say: Callable[[str], None]) -> None:
    """Does nothing where the run was not logged there. What fails costs a line, never the evaluation."""
    if config.logger.name != "wandb" or not folder.wandb_id.is_file():
        return
    try:
        kept = folder.wandb_run() or {}
        import wandb

        logger = config.logger
        run = wandb.init(
            **({"project": logger.project, "entity": logger.entity} | kept),
            resume=None if logger.offline else "allow",
            mode="offline" if logger.offline else "online",
            dir=str(folder.path),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=logger.timeout, finish_timeout=logger.timeout
            ),
        )
        for record in records:
            run.summary.update({f"eval/{name}": value for name, value in named(record).items()})
        run.finish()
    except Exception as error:  # no package, no network, no key
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        say(
            f"warning: W&B did not take the results ({type(error).__name__}: {reason}); they are in {folder.evaluation}"
        )


def named(record: Record) -> dict[str, float]:
    """The metrics of a record as W&B's summary names them: WHAT/METRIC, the settings that commonly differ in WHAT."""
    of = record.what
    if record.what == "loss":
        of = f"{record.settings['split']}/context-{record.settings['context']}"
    if record.what.startswith("answers/"):
        of += f"/context-{record.settings['context']}"
    if record.ema:
        of += "/ema"
    return {f"{of}/{name}": value for name, value in record.metrics.items()}
