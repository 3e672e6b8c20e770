"""Learning rates of optim=sft and optim=dpo, on a small model that has read text: what conversations and preferences
gain from each, and what the text loses.

python benchmarks/finetuning.py      prints the tables and writes benchmarks/results/finetuning.md
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.report import RESULTS, machine, table

import hybridlm
from hybridlm.data.chat import template_of
from hybridlm.data.preparing.prepare import held_out_text
from hybridlm.data.reading.documents import Turn
from hybridlm.generate.engine import Engine
from hybridlm.generate.sampling import Sampling

HERE = Path(__file__).parents[1]
MODEL = ["model.d_model=96", "model.n_layers=2", "model.attention.n_heads=4", "data=files"]
MODEL += [f"data.path=[{HERE}/hybridlm,{HERE}/docs]", "data.tokenizer.vocab_size=1024"]
SHORT = ["hardware=cpu", "callbacks=none", "trainer.precision=32-true", "data.global_batch=16", "data.seq_len=96"]
SHORT += ["trainer.val_every=null", "trainer.log_every=1000", "trainer.ckpt_every=100000"]
BASE_STEPS, SFT_STEPS, DPO_STEPS = 400, 300, 80
SFT_RATES, DPO_RATES = ("1e-4", "3e-4", "1e-3", "3e-3"), ("1e-5", "3e-5", "1e-4", "3e-4")
CHATS, ASKED, TEXT = 4000, 200, 10_000  # conversations, questions, tokens of text
COLOURS = ["red", "blue", "green", "pink", "grey", "black", "white", "brown"]


def question(rng: random.Random) -> tuple[str, str, str]:
    """A question, its answer, and a wrong one of the same kind: sums, counting, and looking up."""
    kind, one, other = rng.randrange(3), rng.randrange(10), rng.randrange(10)
    if kind == 0:
        right = one + other
        return f"What is {one} + {other}?", str(right), str(right + rng.choice([-2, -1, 1, 2]))
    if kind == 1:
        count = 1 + one % 6
        return f"How many stars: {'* ' * count}", str(count), str(count + rng.choice([-1, 1]))
    names = rng.sample(COLOURS, 3)
    values = rng.sample(range(10), 3)
    told = ", ".join(f"{name} is {value}" for name, value in zip(names, values, strict=True))
    return f"{told}. Which number is {names[one % 3]}?", str(values[one % 3]), str(values[(one + 1) % 3])


def trained(folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    """The summary of a run, whose lines are not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        summary: dict[str, float] = hybridlm.train(hybridlm.compose(overrides), folder).summary
    return summary


def right(folder: Path, questions: Sequence[tuple[str, str, str]]) -> float:
    """The share of questions that are answered exactly, greedily."""
    run = hybridlm.load(folder)
    template = template_of(run.tokenizer)
    prompts = [template.encode_prompt([Turn("user", asked)], run.tokenizer) for asked, _, _ in questions]
    sampling = Sampling(temperature=0.0, stop_ids=(template.end_id, run.tokenizer.eos_id), max_new_tokens=8)
    answers = Engine(run.model, run.tokenizer).generate(prompts, sampling)
    return sum(one.text == answer for one, (_, answer, _) in zip(answers, questions, strict=True)) / len(questions)


def text_loss(folder: Path, texts: Sequence[str]) -> float:
    """Nats per token of held-out text."""
    run = hybridlm.load(folder)
    return sum(run.loss(text) for text in texts) / len(texts)


def main() -> None:
    """The base, then each rate of supervised fine-tuning, then each rate of DPO on the best of these."""
    rng, began = random.Random(0), machine()
    place = Path(tempfile.mkdtemp())
    made = list({question(rng): None for _ in range(CHATS + ASKED)})
    asked, learned = made[:ASKED], made[ASKED:]
    chats = [{"prompt": one, "response": answer} for one, answer, _ in learned]
    pairs = [{"prompt": one, "chosen": answer, "rejected": wrong} for one, answer, wrong in learned]
    for name, records in (("chats", chats), ("pairs", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trained(place / "base", [*SHORT, *MODEL, f"trainer.max_steps={BASE_STEPS}"])
    base = hybridlm.load(place / "base")
    texts = [text for text in held_out_text(hybridlm.compose(MODEL).data, base.tokenizer, TEXT) if text.strip()]
    header = ("optim.lr", "held-out conversations, bits per byte", "right answers", "text, nats per token")
    rows, best = [["before", "", "", f"{text_loss(place / 'base', texts):.3f}"]], (0.0, "")
    for rate in SFT_RATES:
        run = [
            f"init_from={place}/base",
            "data=chat",
            f"data.path={place}/chats.jsonl",
            "optim=sft",
            f"optim.lr={rate}",
        ]
        found = trained(place / f"sft{rate}", [*run, *SHORT, f"trainer.max_steps={SFT_STEPS}"])
        share = right(place / f"sft{rate}", asked)
        rows.append([rate, f"{found['val/bpb']:.3f}", f"{share:.0%}", f"{text_loss(place / f'sft{rate}', texts):.3f}"])
        print(rows[-1], flush=True)
        best = max(best, (share, rate))
    lines = [
        "`python benchmarks/finetuning.py`",
        "",
        began,
        "",
        f"optim=sft, {SFT_STEPS} steps:",
        "",
        *table(header, rows),
    ]
    header = ("optim.lr", "held-out pairs ranked right", "margin", "right answers", "text, nats per token")
    rows = []
    for rate in DPO_RATES:
        start = f"init_from={place}/sft{best[1]}"
        run = [start, "data=preferences", f"data.path={place}/pairs.jsonl", "optim=dpo", f"optim.lr={rate}"]
        found = trained(place / f"dpo{rate}", [*run, *SHORT, f"trainer.max_steps={DPO_STEPS}"])
        values = (
            f"{found['val/accuracy']:.1%}",
            f"{found['val/margin']:.2f}",
            f"{right(place / f'dpo{rate}', asked):.0%}",
        )
        rows.append([rate, *values, f"{text_loss(place / f'dpo{rate}', texts):.3f}"])
        print(rows[-1], flush=True)
    lines += ["", f"optim=dpo, {DPO_STEPS} steps from the run of {best[1]}:", "", *table(header, rows)]
    text = "# finetuning\n\n" + "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "finetuning.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
