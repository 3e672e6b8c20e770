"""What `hybridlm chat` does: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybridlm.data.reading.documents import encodable
from hybridlm.errors import UserError, for_stream, harmless
from hybridlm.files.home import expanded
from hybridlm.generate.loading import Writer, open_run
from hybridlm.generate.sampling import Sampling

if TYPE_CHECKING:
    from hybridlm.generate.conversation import Conversation

HELP = """\
/reset         begin anew
/save FILE     write the conversation to a file
/load FILE     go on with one
/temp X        temperature of the sampling; 0 takes the likeliest token
/system TEXT   begin anew, with what the assistant is told first
/help          these lines
/quit          end, as the end of input does
Ctrl-C stops an answer. A line that begins with // is a text that begins with /."""


def run_chat(
    run: str, sampling: Sampling, *, ema: bool, context: int | None, system: str | None, load: Path | None
) -> None:
    """Reads lines until they end and prints what the model answers to each. ConfigError: the run or the state cannot be
    used."""
    writer = open_run(run, ema=ema, context=context)
    terminal = Terminal(sys.stdin.isatty() and sys.stdout.isatty())
    conversation = _conversation(writer, sampling, terminal.note)
    if system is not None:
        conversation.reset(system)
    if load is not None:
        conversation.load(load)
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # what is no UTF-8 costs a note, not the conversation
    terminal.greet(writer, conversation)
    for line in terminal.lines():
        try:
            if not encodable(line):
                raise UserError("not UTF-8 text")
            if line.startswith("/") and not line.startswith("//"):
                if not _command(conversation, line, terminal.note):
                    return
            elif line or conversation.template is None:
                terminal.answer(conversation, line[1:] if line.startswith("//") else line)
        except UserError as error:
            for problem in error.problems:
                terminal.note(problem)


def _conversation(writer: Writer, sampling: Sampling, tell: Callable[[str], None]) -> Conversation:
    from hybridlm.data.chat import template_of
    from hybridlm.generate.conversation import Conversation
    from hybridlm.generate.engine import Engine

    engine, tokenizer = writer.engine, writer.run.tokenizer
    if engine.context is None:
        if writer.trained_length is None:
            raise UserError(
                f"{writer.run.folder.config}: does not say how long a text the model was trained on; give --context N"
            )
        engine = Engine(engine.model, tokenizer, context=writer.trained_length)
    template = template_of(tokenizer) if writer.run.folder.chat_template.is_file() else None
    return Conversation(engine, tokenizer, template, sampling, tell)


def _command(conversation: Conversation, line: str, note: Callable[[str], None]) -> bool:
    """Does what a line with a slash says; False: the end. ConfigError: it cannot be done."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    takes = {"/save": "FILE", "/load": "FILE", "/temp": "X", "/system": "TEXT"}
    if name in takes and not argument:
        raise UserError(f"{name}: expected {name} {takes[name]}")
    match name:
        case "/quit":
            return False
        case "/help":
            note(HELP)
        case "/reset":
            conversation.reset()
            note("a new conversation")
        case "/system":
            conversation.reset(argument)
            note("a new conversation, with this system message")
        case "/temp":
            conversation.sampling = replace(conversation.sampling, temperature=_number(argument))
            note(f"temperature {conversation.sampling.temperature:g}")
        case "/save":
            conversation.save(expanded(argument))
            note(f"saved: {conversation.tokens:,} tokens in {argument}")
        case "/load":
            conversation.load(expanded(argument))
            note(
                f"loaded: {conversation.tokens:,} tokens"
                + (f", {len(conversation.turns)} messages" if conversation.turns else "")
            )
        case _:
            raise UserError(f"unknown command {name}; /help lists them")
    return True


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"/temp {text}: expected a number, 0 or more") from None


class Terminal:
    """Lines in, answers out. Where either end is no terminal there is no prompt, and notes go to standard error."""

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._mid_line = False  # whether the answer has left the cursor behind its text

    def greet(self, writer: Writer, conversation: Conversation) -> None:
        if not self._interactive:
            return
        kind = "it goes on with what you write" if conversation.template is None else "trained on conversations"
        self.note(
            f"{writer.run.folder.path.name}, step {writer.run.step:,}: {kind}; context {conversation.context:,} tokens;"
            " /help"
        )

    def note(self, text: str) -> None:
        """What the program says, not the model."""
        if self._interactive:
            self._end_line()
            print("\n".join(f"\033[2m{line}\033[0m" for line in harmless(text).splitlines()), flush=True)  # dim
        else:
            print(harmless(text), file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._mid_line:
            print()
        self._mid_line = False

    def lines(self) -> Iterator[str]:
        """What the user writes, until it ends or the second Ctrl-C in a row at the prompt."""
        if not self._interactive:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        with suppress(ImportError):  # on Windows
            import readline  # noqa: F401, input() then has a history and can be edited
        stopped = False
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if stopped:
                    return
                stopped = True
                self.note("Ctrl-C once more ends")
                continue
            stopped = False
            yield line

    def answer(self, conversation: Conversation, text: str) -> None:
        """Prints the answer as it comes; Ctrl-C stops it, between two tokens, so that the conversation can go on."""
        with _interrupts() as interrupted, closing(conversation.say(text)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                sys.stdout.write(for_stream(piece, sys.stdout))
                sys.stdout.flush()
                self._mid_line = True
                if interrupted():
                    break
        self._end_line()
        if interrupted():
            self.note("stopped")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C raises nothing; the function says whether it came. In the middle of a forward it would leave
    half of it behind."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
