"""Reports over folders with a stranger's run beside good ones: it is skipped with a line or reported, and nothing in it
executes."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import re
from pathlib import Path

import pytest
import yaml
from hostile import VALUES, little, mutated
from run_folders import make_job, make_run

from hybridlm.report.comparison import compare
from hybridlm.report.page import header, rendered, run_report, sections_of
from hybridlm.report.runs import read_folders
from hybridlm.report.table import csv_cell, to_csv

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
FILES = ("config.yaml", "summary.json", "metrics.jsonl", "eval.json", "job.json", "sweep.json", ".hydra/hydra.yaml")
EVALUATION = {
    "format_version": 1,
    "results": [
        {
            "what": "loss",
            "ema": False,
            "settings": {"context": 64},
            "metrics": {"bpb": 2.0},
            "curve": [{"length": 32, "accuracy": 0.5}] * 2,
        },
        {
            "what": "probe/recall",
            "settings": {},
            "metrics": {"accuracy": 0.25},
            "curve": [{"length": 64, "accuracy": 0.25}],
        },
    ],
}


def report(folder: Path, capsys) -> tuple[list[str], str]:
    """Names of the runs in report.csv, and what went to standard error."""
    with little():
        run_report([str(folder)], folder / "out")
    said = capsys.readouterr()
    assert re.fullmatch(r"[\x20-\x7e\n\x80-\uffff]*", said.out + said.err)
    with open(folder / "out/report.csv", encoding="utf-8", newline="") as file:
        return [row["run"] for row in csv.DictReader(file)], said.err


def config(folder: Path, **changes) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def summarised(folder: Path, text: str) -> None:
    (folder / "summary.json").write_text(text)


def piped(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def linked(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse


LEFT_OUT = {
    "bomb": lambda path: (path / "config.yaml").write_text(BOMB),
    "self": lambda path: (path / "config.yaml").write_text("model: &a\n  x: *a\n"),
    "tag": lambda path: (path / "config.yaml").write_text("model: !!python/object/apply:os.system [touch pwned]\n"),
    "depth": lambda path: (path / "config.yaml").write_text("model: " + "[" * 5000 + "]" * 5000),
    "digits": lambda path: summarised(path, '{"val/bpb": ' + "9" * 5000 + "}"),
    "deep": lambda path: summarised(path, "[" * 100_000),
    "list": lambda path: summarised(path, '{"val/bpb": 2.0, "val_bytes": [1]}'),
    "job": lambda path: (path / "job.json").write_text('{"status": {"a": 1}}'),
    "seconds": lambda path: (path / "job.json").write_text('{"status": "failed", "seconds": -1e999}'),
    "row": lambda path: (path / "metrics.jsonl").write_text('{"step": 1, "train/loss": {"a": 1}}\n'),
    "row of digits": lambda path: (path / "metrics.jsonl").write_text('{"step": 1' + "0" * 5000 + "}\n"),
    "latin": lambda path: (path / "summary.json").write_bytes(b'{"device": "\xe9"}'),
    **{f"pipe {name}": lambda path, name=name: piped(path / name) for name in (*FILES, "samples.txt", "layers.txt")},
    "pipe train.log": lambda path: ((path / "summary.json").unlink(), piped(path / "train.log")),
    **{
        f"link {name}": lambda path, name=name: linked(path / name)
        for name in ("metrics.jsonl", "summary.json", "layers.txt")
    },
    **{
        f"huge {name}": lambda path, name=name: huge(path / name)
        for name in ("metrics.jsonl", "summary.json", "config.yaml")
    },
}
KEPT = {
    "date": lambda path: (path / "config.yaml").write_text((path / "config.yaml").read_text() + "\nday: 2020-01-01\n"),
    "d_model": lambda path: config(path, model__d_model=10**9),
    "d_model beyond": lambda path: config(path, model__d_model=2**62),
    "layers": lambda path: config(path, model__n_layers=10**6),
    "seq_len": lambda path: config(path, data__seq_len=10**200),
    "lr": lambda path: config(path, optim__lr=1e308),
    "lengths": lambda path: (path / "eval.json").write_text(json.dumps(EVALUATION).replace("32", "NaN").replace("64", "1e300")),  # noqa: E501
    "length of digits": lambda path: summarised(path, json.dumps({"val/bpb": 2.0, f"val/exact/{'9' * 5000}": 0.5, "val/exact/1": 0.5})),  # noqa: E501
    "perplexity": lambda path: (path / "metrics.jsonl").write_text('{"step": 1, "train/ppl": 1e300, "val/bpb": 1e300}\n' * 2),  # noqa: E501
    "huge samples": lambda path: huge(path / "samples.txt"),
    "infinite": lambda path: summarised(path, '{"val/bpb": Infinity, "seconds": NaN, "tokens_per_s": -Infinity}'),
    "large": lambda path: summarised(path, '{"val/bpb": 2.0, "seconds": 1e308}'),
    "name": lambda path: path.rename(path.parent / "bad $x$ \x1b[2J javascript:alert(1)"),
}  # fmt: skip


def test_unreadable_runs_are_skipped_with_a_line_each(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/good", pattern="T", bpb=1.9)
    for kind, spoil in LEFT_OUT.items():
        spoil(make_run(tmp_path / "runs" / kind, pattern="M"))
    names, said = report(tmp_path / "runs", capsys)
    assert names == ["good"]
    skipped = [line.partition(": ") for line in said.splitlines()]
    assert {begin.removeprefix("skipped ") for begin, _, _ in skipped} == {
        str(tmp_path / "runs" / kind) for kind in LEFT_OUT
    }
    assert len(skipped) == len(LEFT_OUT)
    assert all(reason for _, _, reason in skipped)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kinds", [list(KEPT)[i::4] for i in range(4)], ids=", ".join)
def test_odd_numbers_do_not_break_a_report(tmp_path, kinds, capsys):
    make_run(tmp_path / "runs/good", pattern="T", bpb=1.9)
    for kind in kinds:
        KEPT[kind](make_run(tmp_path / f"runs/bad {kind}", pattern="M"))
    names, said = report(tmp_path / "runs", capsys)
    assert "good" in names
    assert len(names) == 1 + len(kinds)
    assert said == ""


@pytest.mark.parametrize(
    "seed", [pytest.param(range(12), id="12"), pytest.param(range(12, 1500), id="1488", marks=pytest.mark.slow)]
)
def test_mutated_runs_do_not_break_a_report(tmp_path, seed, capsys):
    for number in seed:
        generator = random.Random(number)
        folder = tmp_path / str(number)
        make_run(folder / "good", pattern="T", bpb=1.9)
        bad = make_job(make_run(folder / "bad", pattern="M", seed=number), 1, "finished")
        (bad / "eval.json").write_text(json.dumps(EVALUATION))
        (bad / "sweep.json").write_text(json.dumps({"command": "hybridlm sweep", "varied": ["model.pattern"]}))
        (bad / ".hydra/hydra.yaml").write_text("hydra: {runtime: {cwd: /tmp}}\n")
        for name in generator.sample(FILES, generator.randint(1, 3)):
            mutate(bad / name, generator)
        with little():
            runs, sweeps = read_folders([folder])
            comparisons = compare(runs, [key for sweep in sweeps for key in sweep.varied])
            facts = header(runs, sweeps, "hybridlm report", "today")
            to_csv(comparisons)
            if generator.random() < 0.2:  # plots take long
                parts = sections_of(comparisons, folder)
                html, text = (rendered(kind, parts, facts) for kind in ("html", "md"))
                assert "<script>alert" not in html + text
                assert "\x1b" not in text
        assert "good" in [run.name for run in runs]
    capsys.readouterr()


def mutate(path: Path, generator: random.Random) -> None:
    text = path.read_text(encoding="utf-8")
    if generator.random() < 0.2:
        path.write_text(text[: generator.randrange(len(text))], encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = text.splitlines()
        row = mutated(json.loads(generator.choice(lines)), generator, strange)
        path.write_text("\n".join([*lines, json.dumps(row), *lines[:1]]) + "\n", encoding="utf-8")
    else:
        tree = mutated(yaml.safe_load(text), generator, strange)
        path.write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree), encoding="utf-8")


def strange(generator: random.Random) -> object:
    return copy.deepcopy(generator.choice([*VALUES, "$\\frac{$", "a|b`c`*d*", "-1.5", "@SUM(A1)", "+x", "\t=1"]))


def test_text_of_a_run_cannot_execute(tmp_path, capsys):
    """Script tags, formulas, escapes and line ends in every text that a report shows."""
    evil = "<script>alert(1)</script>\x1b]0;x\x07\r\n# head\n=1+1|`x`"
    for name, pattern in (("a", "T"), ("b", "M")):
        folder = make_run(
            tmp_path / f"runs/{name} <script>alert(1)</script>\x1b",
            pattern=pattern,
            facts={"device": evil + name, "torch": evil, f"probe/{evil}/accuracy": 0.5},
            overrides=[f"++data.path={evil}{name}", f"++model.pattern={pattern}"],
        )
        config(folder, data__path=evil + name, model__name=evil, optim__name=evil + name)
        for file in ("samples.txt", "layers.txt", "plan.txt"):
            (folder / file).write_text(evil)
        found = copy.deepcopy(EVALUATION)
        for record in found["results"]:
            record |= {"what": evil, "settings": {evil: evil}, "metrics": {evil: 1.0}}
        (folder / "eval.json").write_text(json.dumps(found))
    make_job(tmp_path / "runs/c", 3, "failed", error=evil, overrides=[evil])
    (tmp_path / "runs/sweep.json").write_text(json.dumps({"command": evil, "varied": [evil]}))
    names, said = report(tmp_path / "runs", capsys)
    assert len(names) == 3
    assert said == ""
    html = (tmp_path / "runs/out/report.html").read_text(encoding="utf-8")
    assert html.count("<script>") == 1  # that of the page
    text = (tmp_path / "runs/out/report.md").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert "<script>" not in "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "\n# head" not in text
    with open(tmp_path / "runs/out/report.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if re.search(r"[\x00-\x1f\x7f]", cell) or re.match(r"[=+@]|-[^\d]", cell)]


def test_csv_cells_are_not_formulas_and_numbers_stay_numbers():
    texts = ["=1+1", "+1+1", "-1+1", "@x", "-1.5", "+2e-3", "1", "-", "a=b", "\r=1", "\x1b[2J", "☃"]
    assert list(map(csv_cell, texts)) == [
        "'=1+1",
        "'+1+1",
        "'-1+1",
        "'@x",
        "-1.5",
        "+2e-3",
        "1",
        "-",
        "a=b",
        "\\r=1",
        "\\x1b[2J",
        "☃",
    ]
