"""A saved state goes on, bit for bit, as it would have; a damaged or foreign one is refused in a line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import every_pattern, small_config, small_model

from hybridlm.errors import UserError
from hybridlm.files.sealed import digest
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling
from hybridlm.generate.state_file import KEY, load_state, save_state

PROMPT = [1, 5, 9, 2, 2, 7]


def written(engine: Engine, state, tokens: int, seed: int = 4) -> list[int]:
    sampling = Sampling(temperature=1.2, seed=seed, max_new_tokens=tokens)
    return [step.id for step in engine.run(state, [sampling] * len(state.ids))]


@every_pattern
@pytest.mark.parametrize("pending", [True, False])
def test_going_on_after_loading_is_going_on(pattern, pending, tmp_path):
    """Also where the newest token is not read yet, and where the text outgrows the room."""
    engine = Engine(small_model(small_config(pattern), torch.float32), None)
    path = tmp_path / "a.state"
    state = engine.prefill([PROMPT])
    if pending:
        written(engine, state, 5)
    assert (state.logits is None) == pending
    save_state(path, state, engine.model, "a note")
    want = written(engine, state, 20)
    again, note = load_state(path, engine.model)
    assert note == "a note"
    assert written(engine, again, 20) == want
    assert again.ids == state.ids
    assert again.cache.past == state.cache.past
    mine, its = again.cache.state_dict(), state.cache.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_rows_of_unequal_lengths_are_kept(tmp_path):
    engine = Engine(small_model(small_config("L M3 W X:moe"), torch.float32), None)
    state = engine.prefill([PROMPT, [3], [4, 4]], room=40)
    save_state(tmp_path / "a", state, engine.model)
    want = engine.generate([PROMPT, [3], [4, 4]], Sampling(seed=2, max_new_tokens=9))
    again, _ = load_state(tmp_path / "a", engine.model)
    ids: list[list[int]] = [[], [], []]
    for step in engine.run(again, [Sampling(seed=2 + row, max_new_tokens=9) for row in range(3)]):
        ids[step.row].append(step.id)
    assert ids == [one.ids for one in want]


def test_of_mambas_alone_the_file_does_not_grow_with_the_text(tmp_path):
    sizes = {}
    for pattern in ("M1 M2 M3", "M1 T"):
        engine = Engine(small_model(small_config(pattern), torch.float32), None)
        for length in (8, 800):
            save_state(tmp_path / "a", engine.prefill([[1] * length]), engine.model)
            sizes[pattern, length] = (tmp_path / "a").stat().st_size - 8 * length  # the ids themselves
    assert abs(sizes["M1 M2 M3", 800] - sizes["M1 M2 M3", 8]) < 100
    assert sizes["M1 T", 800] > sizes["M1 T", 8] + 792 * 2 * 4 * 4  # keys and values of one head of four channels


def refused(path, model, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_state(path, model)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_what_is_no_state_of_this_model_is_refused_in_a_line(tmp_path):
    model = small_model(small_config("MT"), torch.float32)
    path = tmp_path / "a"
    save_state(path, Engine(model, None).prefill([PROMPT]), model)
    load_state(path, model)
    refused(path, small_model(small_config("MT"), torch.float32, seed=1), "another model")
    refused(path, small_model(small_config("TM"), torch.float32), "another model")
    refused(tmp_path / "b", model, "no such file")
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "c").write_bytes(whole[:cut])
        refused(tmp_path / "c", model, "damaged")
    for place in (len(whole) - 3, len(whole) - 200):
        (tmp_path / "c").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(tmp_path / "c", model, "damaged")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "d")
    refused(tmp_path / "d", model, "not a state")
    facts = json.dumps({"format_version": 99})
    save_file(tensors, tmp_path / "d", {KEY: facts, "sha256": digest(facts, tensors)})
    refused(tmp_path / "d", model, "format version 99, this program reads 1")


def test_a_state_that_cannot_be_written_is_said_in_a_line(tmp_path):
    model = small_model(small_config("MT"), torch.float32)
    with pytest.raises(UserError, match="cannot be written"):
        save_state(tmp_path / "nowhere" / "a", Engine(model, None).prefill([PROMPT]), model)
