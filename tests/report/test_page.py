"""The page: well-formed, whole in itself, escaped; readable at 1 and at 200 runs."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from run_folders import make_job, make_run

from hybridlm.report.page import run_report
from hybridlm.report.plots.curves import SMOOTHING

VOID = {"meta", "br", "img", "hr", "input", "link", "source"}
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Fails on a tag that is closed in the wrong place; keeps tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data

    def images(self, narrow=False):
        """The plots, parsed: those of a wide window, or of a narrow one."""
        tag_name, name = ("source", "srcset") if narrow else ("img", "src")
        sources = [attributes[name] for tag, attributes in self.tags if tag == tag_name]
        return [
            ElementTree.fromstring(base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")))
            for source in sources
        ]


def report(*folders, out=None):
    run_report(list(map(str, folders)), out)
    return Page(((out or folders[0]) / "report.html").read_text())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two patterns of two seeds, a failed job, a run on another text, and its evaluation."""
    folder = tmp_path_factory.mktemp("sweep")
    for i, (pattern, seed) in enumerate([("T", 0), ("T", 1), ("M", 0), ("M", 1)]):
        make_run(
            folder / str(i),
            pattern=pattern,
            seed=seed,
            bpb=2.0 - 0.1 * i,
            facts={"train_flops_per_token": 1e6 * (1 + i // 2)},
        )
    make_job(
        folder / "4", 4, "failed", error="config error: data.path = 'x': no file", overrides=['model.pattern="TM"']
    )
    by_length = {f"val/accuracy/{length}": 0.5 for length in (64, 128)}
    task = {"val/bpb": None, "val/accuracy": 0.9, "val_bytes": None, **by_length}
    make_run(folder / "5", pattern="MT", facts=task, settings={"data.val_fraction": 0.5})
    (folder / "0/eval.json").write_text('{"results": [{"what": "loss", "settings": {}, "metrics": {"bpb": 2.5}}]}')
    return folder


def test_everything_is_on_the_page(sweep, tmp_path, capsys):
    page = report(sweep, out=tmp_path / "new/out")
    drawn = {"report-1-costs.svg", "report-1-learning.svg", "report-2-course.svg", "report-2-length-1.svg"}
    assert {path.name for path in (tmp_path / "new/out").iterdir()} == {
        "report.csv",
        "report.html",
        "report.md",
        *drawn,
    }
    assert len(page.images()) == len(page.images(narrow=True)) == len(drawn)
    assert {attributes["media"] for tag, attributes in page.tags if tag == "source"} == {"(max-width: 800px)"}
    for file in drawn:
        ElementTree.parse(tmp_path / "new/out" / file)
        assert f"]({file})" in (tmp_path / "new/out/report.md").read_text()
    text = (tmp_path / "new/out/report.md").read_text()
    assert (
        "| # | configuration | 64 (tokens) | 128 (tokens) |\n|---:|---|---:|---:|\n| 1 | MT | 0.500 | 0.500 |" in text
    ), "the numbers of the plot"
    for text in (
        "M is best: 1.7500",
        "failed (run 4, seed 0): config error: data.path = 'x': no file",
        "2.5",
        "return x < 1",
    ):
        assert text in page.text, text
    assert "6: 5 finished, 1 failed" in page.text
    assert "validated on 2 different texts or tasks" in page.text
    assert "python train.py 'model.pattern=\"T\"' seed=1" in page.text
    assert f"hybridlm report {sweep} --out {tmp_path}/new/out" in page.text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 6
    assert all((tmp_path / "new/out" / link).is_dir() for link in links)
    assert "M is best" in capsys.readouterr().out
    text = (tmp_path / "new/out/report.md").read_text()
    assert "    python train.py 'model.pattern=\"T\"' seed=1\n" in text
    assert "| M | 1.7500 ± 0.0707 | best |" in text


@pytest.fixture(scope="module")
def page(sweep):
    """Beside the runs."""
    return report(sweep)


def test_the_page_is_self_contained(page, sweep):
    text = (sweep / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "srcset"))
        assert tag != "script" or not attributes
    for image in [*page.images(), *page.images(narrow=True)]:
        references = [value for node in image.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(value.startswith("#") for value in references)


def test_everything_in_a_run_is_escaped(tmp_path):
    folder = make_run(
        tmp_path / "r & <b>", pattern="T", overrides=[f"++model.name={EVIL}", "++seed=0"], settings={"model.name": EVIL}
    )
    make_run(tmp_path / "other", pattern="T", settings={"model.name": "$\\frac{a}$"})
    make_job(tmp_path / "job", 2, "failed", error=EVIL, overrides=[f"model.name={EVIL}"])
    (folder / "samples.txt").write_text(EVIL)
    (folder / "eval.json").write_text(
        json.dumps({"results": [{"what": EVIL, "settings": {EVIL: EVIL}, "metrics": {EVIL: 1}}]})
    )
    (tmp_path / "sweep.json").write_text(json.dumps({"command": EVIL, "varied": ["model.name"]}))
    page = report(tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 6
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert not [line for line in lines if "<script>" in line and not line.startswith("    python train.py")], (
        "those are blocks of code"
    )


def test_one_run(tmp_path, capsys):
    folder = make_run(tmp_path / "a", facts={"tokens": 20_480})
    (folder / "eval.json").write_text(
        '{"results": [{"what": "needle", "settings": {}, "metrics": {"accuracy": 0.75}}]}'
    )
    page = report(tmp_path)
    for text in (
        "stdlib, 290 kB held out: run a",
        "gzip reaches 2.1000 and xz reaches 1.8000.",
        "Course of the run",
        SMOOTHING,
        "return x < 1 and '</pre>'",
        "0  attention",
        "0.75",
    ):
        assert text in page.text, text
    assert "vs best" not in page.text, "there is nothing to compare"
    cells = re.findall(r"<td[^>]*>(.*?)</td>", (tmp_path / "report.html").read_text())
    rows = dict(pairwise(cells))
    assert (rows["pattern"], rows["width"], rows["parameters"], rows["learning rate"]) == (
        "TM",
        "64",
        "200 thousand",
        "0.02",
    )
    assert rows["data"] == "stdlib"
    assert len(page.images()) == len(page.images(narrow=True)) == 1
    text = (tmp_path / "report.md").read_text()
    assert "![Course of the run](report-1-course.svg)" in text
    assert "    layer  mixer\n        0  attention\n" in text
    assert "| pattern | TM | model.pattern |" in text
    assert capsys.readouterr().out.startswith("stdlib, 290 kB held out: run a: 2.0000 bits per byte")


def test_one_run_that_has_not_finished(tmp_path):
    page = report(make_run(tmp_path / "a", bpb=None))
    assert "Unfinished: no summary.json; the last metrics are from step 40." in page.text
    assert "best validation" in page.text
    assert len(page.images()) == 1


def test_a_run_on_a_different_text_is_shown_alone(page):
    assert "stdlib: run 5" in page.text
    assert "0.900 accuracy" in page.text


def test_cautions_are_above_the_table_and_on_the_terminal(tmp_path, capsys):
    for i, pattern in enumerate("TM"):
        folder = make_run(tmp_path / str(i), pattern=pattern)
        rows = [{**json.loads(line), "data/epoch": 0.1} for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(tmp_path)
    screen, text = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    for said in ("These runs saw 10% of the training text", "All configurations used the same learning rate"):
        assert f"Caution. {said}" in page.text
        assert page.text.index(said) < page.text.index("model.pattern")
        assert f"**Caution.** {said}" in text
        assert f"\ncaution: {said}" in screen


def test_nearly_empty_runs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("model: {}\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.yaml").write_text("model: {name: x}\n")
    (tmp_path / "b/summary.json").write_text('{"run": "b"}')
    page = report(tmp_path)
    assert "nothing to compare" in page.text
    assert page.images() == []


def test_a_second_report_counts_the_same_runs(page, sweep):
    assert report(sweep).tags == page.tags


@pytest.mark.slow
def test_two_hundred_runs_of_fifty_configurations(tmp_path):
    """All in the table; in the plots seven have colours and names, and the others share an entry."""
    for i in range(200):
        group, seed = divmod(i, 4)
        lr = (group + 1) / 1000
        facts = {"tokens_per_s": 1e4 + group * 100.0, "train_flops_per_token": 1e6 + group, "memory_gb": 1 + group % 7}
        lines = [f"++optim.lr={lr}", f"++seed={seed}"]
        make_run(
            tmp_path / str(i),
            seed=seed,
            bpb=2 + group / 100 + seed / 1000,
            facts=facts,
            settings={"optim.lr": lr},
            overrides=lines,
        )
    page = report(tmp_path)
    costs, learning, _by_rate = page.images()
    assert len([tag for tag, _ in page.tags if tag == "tr"]) == 51
    for image in (costs, learning):
        width, height = (float(image.attrib[side].removesuffix("pt")) for side in ("width", "height"))
        assert 700 < width < 900
        assert height < 600
    assert "200: 200 finished" in page.text
