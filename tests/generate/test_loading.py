"""What a run folder tells about the lengths it was trained on."""

from __future__ import annotations

import pytest

from hybridlm.generate.loading import trained_length
from hybridlm.runs.run_folder import RunFolder


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ("data:\n  seq_len: 64\nlogger:\n  a_field_of_another_version: false\n", 64),
        ("data:\n  seq_len: long\n", None),
        ("data:\n  seq_len: true\n", None),
        ("data:\n  seq_len: 1\n", None),
        ("data: 64\n", None),
        ("[64]\n", None),
        ("data: {\n", None),
        (None, None),
    ],
)
def test_the_training_window_is_read_whatever_else_config_yaml_holds(tmp_path, config, length):
    folder = RunFolder(tmp_path)
    if config is not None:
        folder.config.write_text(config)
    assert trained_length(folder) == length
