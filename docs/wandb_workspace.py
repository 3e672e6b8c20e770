"""Creates a W&B workspace with the panels of wandb_panels.json.

python docs/wandb_workspace.py --project hybridlm --entity TEAM
--dry-run prints what would be sent; it needs neither a network nor the package wandb-workspaces.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PANELS = Path(__file__).with_name("wandb_panels.json")


def line_plot(panel: dict[str, Any], x: str) -> dict[str, Any]:
    """The arguments of one ``LinePlot``: metrics by name, or by a regular expression over their names."""
    chosen = {"metric_regex": panel["regex"]} if "regex" in panel else {"y": panel["y"]}
    return {"title": panel["title"], "x": x, **chosen, **({"log_y": True} if panel.get("log_y") else {})}


def plan(spec: dict[str, Any], project: str, entity: str | None) -> dict[str, Any]:
    """The arguments of the workspace, its sections and its plots, as plain values."""
    sections = [
        {
            "name": section["name"],
            "is_open": True,
            "panels": [line_plot(panel, spec["x"]) for panel in section["panels"]],
        }
        for section in spec["sections"]
    ]
    return {"name": spec["name"], "entity": entity, "project": project, "sections": sections}


def save(planned: dict[str, Any]) -> str:
    """Creates the workspace and returns its URL."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(**{**section, "panels": [reports.LinePlot(**panel) for panel in section["panels"]]})
        for section in planned["sections"]
    ]
    return str(workspaces.Workspace(**{**planned, "sections": sections}).save().url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", required=True)
    parser.add_argument("--entity", help="user or team; required unless --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent")
    arguments = parser.parse_args()
    planned = plan(json.loads(PANELS.read_text(encoding="utf-8")), arguments.project, arguments.entity)
    if arguments.dry_run:
        print(json.dumps(planned, indent=2))
        return 0
    if arguments.entity is None:
        print("--entity is required: the user or team that owns the workspace", file=sys.stderr)
        return 2
    try:
        print(save(planned))
    except ModuleNotFoundError as error:
        print(f"the package {error.name} is not installed; pip install wandb-workspaces", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
