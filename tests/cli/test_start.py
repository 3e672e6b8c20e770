"""What a start does, counted in one process: it composes once, validates once, parses the pattern at most twice, builds
the model once on "meta" and once for real, and hashes the checkpoint that it resumes from once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from hybridlm.cli.start import main
from hybridlm.config import load, pattern
from hybridlm.files import checksum
from hybridlm.model import build

COUNTED = {
    "validations": (load, "load_config"),
    "parses": (pattern, "parse"),
    "builds": (build, "build_model"),
    "hashes": (checksum, "_digest"),
}


@pytest.fixture
def counted(monkeypatch):
    """``counted(*arguments)``: what the command did up to its first training step, and in all."""
    counts: Counter[str] = Counter()

    def counter(name, function):
        def counting(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return counting

    import hybridlm.train.run  # noqa: F401  # so that all who name the functions are there

    for name, (home, attribute) in COUNTED.items():
        function = getattr(home, attribute)
        for module in [module for key, module in sys.modules.items() if key.startswith("hybridlm.")]:
            for key, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, key, counter(name, function))
    compose, fit = ConfigLoaderImpl.load_configuration, lightning.Trainer.fit
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counter("compositions", compose))
    at_first_step: Counter[str] = Counter()

    def noting(*arguments, **options):
        at_first_step.update(counts)
        return fit(*arguments, **options)

    monkeypatch.setattr(lightning.Trainer, "fit", noting)

    def run(*arguments):
        counts.clear()
        at_first_step.clear()
        main(list(arguments))
        return dict(at_first_step), dict(counts)

    return run


START = {"compositions": 1, "validations": 1, "parses": 2, "builds": 2}


@pytest.mark.parametrize("data", ["stdlib", "files"])
def test_a_start_does_everything_once(counted, tiny, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if data == "files":
        overrides = [*tiny, "trainer.max_steps=4"]
    else:
        some = SimpleNamespace(get_path=lambda name: str(Path(json.__file__).parent))  # all of it takes ten seconds
        monkeypatch.setattr("hybridlm.data.reading.sources.sysconfig", some)
        overrides = ["size=tiny", "trainer.max_steps=4", "data.tokenizer.kind=bytes", "callbacks=none", "hardware=cpu"]
    first, every = counted(*overrides, "hydra.run.dir=run")
    assert first == START
    assert (every["compositions"], every["builds"]) == (1, 2), "also at the end, which loads the checkpoint again"

    first, every = counted("ckpt=run", "trainer.max_steps=6")
    assert first == {**START, "hashes": 1}
    assert (every["compositions"], every["builds"]) == (1, 2)
