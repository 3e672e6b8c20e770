"""No file of values names what Hydra would run, however it goes about it."""

from __future__ import annotations

import pytest

from hybridlm.cli.compose import composed
from hybridlm.cli.start import main
from hybridlm.config.overrides import split
from hybridlm.errors import UserError

TARGET = "{_target_: os.system, command: 'touch PWNED'}"
ATTEMPTS = {
    "experiments/a.yaml": f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}\n",
    "experiments/b.yaml": f"# @package hydra.callbacks\nx: {TARGET}\n",
    "experiments/c.yaml": "# @package hydra.job_logging.handlers\nx: {'()': os.system, command: 'touch PWNED'}\n",
    "experiments/d.yaml": (
        "# @package _global_\nhydra: {job_logging: {handlers: {x: {'()': os.system, command: 'touch PWNED'}}}}\n"
    ),
    "experiments/e.yaml": f'# @package _global_\nmodel: {{"\\x5ftarget_": {TARGET}}}\n',
    "experiments/f.yaml": "# @package _global_\ndefaults: [../evil]\n",
    "experiments/g.yaml": "# @package _global_\ndefaults: [override /hydra/hydra_logging: evil]\n",
    "experiments/h.yaml": "# @package _global_\ndefaults: [inner/a]\n",
    "experiments/inner/a.yaml": f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}\n",
    "experiments/i.yaml": "# @package _global_\nhydra: {searchpath: ['file:///tmp']}\n",
    "experiments/j.yaml": "# @package _global_\nhydra: {sweeper: {params: {+hydra.callbacks.x._target_: os.system}}}\n",
    "optim/k.yaml": f"lr: 1.0\nx: [{TARGET}]\n",
    "hydra/hydra_logging/evil.yaml": "handlers: {x: {'()': os.system, command: 'touch PWNED'}}\n",
    "evil.yaml": f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}\n",
}
CHOICES = [
    f"{name.partition('/')[0]}={name.partition('/')[2].removesuffix('.yaml')}" for name in ATTEMPTS if "/" in name
]
CHOICES = [choice for choice in CHOICES if not choice.startswith("hydra=")] + [
    "experiments=../evil",
    "experiments=../../x",
    "data=../evil",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in ATTEMPTS.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_that_names_code_is_refused(folder, choice):
    with pytest.raises(UserError) as caught:
        composed(split(["--config-dir", "conf", choice]))
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert not (folder / "PWNED").exists()


@pytest.mark.parametrize("more", [[], ["-m"]])
def test_the_command_runs_nothing_of_it(folder, capsys, more):
    for choice in (["experiments=a"], ["experiments=d"], ["experiments=h,smoke"] if more else ["experiments=h"]):
        with pytest.raises(SystemExit) as end:
            main(["--config-dir", "conf", *choice, *more])
        assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["conf"]


def test_what_a_file_may_set(folder):
    (folder / "conf/experiments/fine.yaml").write_text(
        "# @package _global_\noptim: {lr: 3.0}\nhydra: {run: {dir: here}, job: {name: x}}\n"
    )
    found = composed(split(["--config-dir", "conf", "experiments=fine"]))
    assert found.tree["optim"]["lr"] == 3.0


def test_a_pickle_is_no_way_to_start(capsys):
    with pytest.raises(SystemExit):
        main(["--experimental-rerun", "config.pickle"])
    assert "unknown option --experimental-rerun" in capsys.readouterr().err
