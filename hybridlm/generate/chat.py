"""`hybridlm chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from hybridlm.data.chat import template_of
from hybridlm.data.reading.documents import encodable
from hybridlm.errors import UserError, for_stream, harmless
from hybridlm.files.home import expanded
from hybridlm.generate.conversation import Conversation
from hybridlm.generate.loading import open_run, trained_length
from hybridlm.generate.sampling import Sampling

HELP = """\
/reset         start over
/save FILE     save the conversation to a file
/load FILE     continue a saved conversation
/temp X        sampling temperature; 0 always picks the most likely token
/system TEXT   start over with this system message
/help          this list
/quit          quit, like end of input
Ctrl-C stops an answer. Start a line with // to send text that begins with a slash."""


def run_chat(
    run: str, sampling: Sampling, *, ema: bool, context: int | None, system: str | None, load: Path | None
) -> None:
    """Reads lines until end of input and prints the model's answer to each. UserError: the run or the saved
    conversation cannot be used."""
    loaded, engine = open_run(run, ema=ema, context=context)
    if engine.context is None:
        engine.context = trained_length(loaded.folder)
    if engine.context is None:
        raise UserError(f"{loaded.folder.config}: the training window (data.seq_len) is unknown; give --context N")

    terminal = Terminal(sys.stdin.isatty() and sys.stdout.isatty())
    template = template_of(loaded.tokenizer) if loaded.folder.chat_template.is_file() else None
    conversation = Conversation(engine, loaded.tokenizer, template, sampling, terminal.note)
    if system is not None:
        conversation.reset(system)
    if load is not None:
        conversation.load(load)
    # Input that is not UTF-8 then costs a note, not the conversation.
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    terminal.greet(f"{loaded.folder.path.name}, step {loaded.step:,}", conversation)
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


def _command(conversation: Conversation, line: str, note: Callable[[str], None]) -> bool:
    """Runs a slash command; False: quit. UserError: it is not possible."""
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
            try:
                temperature = float(argument)
            except ValueError:
                raise UserError(f"/temp {argument}: expected a number, 0 or more") from None
            conversation.sampling = replace(conversation.sampling, temperature=temperature)
            note(f"temperature {conversation.sampling.temperature:g}")
        case "/save":
            conversation.save(expanded(argument))
            note(f"saved: {conversation.tokens:,} tokens to {argument}")
        case "/load":
            conversation.load(expanded(argument))
            messages = f", {len(conversation.turns)} messages" if conversation.turns else ""
            note(f"loaded: {conversation.tokens:,} tokens{messages}")
        case _:
            raise UserError(f"unknown command {name}; /help lists the commands")
    return True


class Terminal:
    """Lines in, answers out. If either end is not a terminal there is no prompt, and notes go to standard error."""

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._mid_line = False  # whether the cursor is at the end of an answer

    def greet(self, run: str, conversation: Conversation) -> None:
        if self._interactive:
            kind = "continues your text" if conversation.template is None else "trained on conversations"
            self.note(f"{run}: {kind}; context {conversation.context:,} tokens; /help")

    def note(self, text: str) -> None:
        """Prints a line from the program, not from the model."""
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
        """The user's lines, until end of input or a second Ctrl-C in a row at the prompt."""
        if not self._interactive:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        with suppress(ImportError):  # on Windows
            import readline  # noqa: F401, gives input() a history and line editing
        interrupted = False
        while True:
            try:
                yield input("> ")
                interrupted = False
            except (EOFError, KeyboardInterrupt) as end:
                print()
                if interrupted or isinstance(end, EOFError):
                    return
                interrupted = True
                self.note("press Ctrl-C again to quit")

    def answer(self, conversation: Conversation, text: str) -> None:
        """Prints the answer as it is generated. Ctrl-C stops it between two tokens: raised in the middle of a forward,
        it would leave the caches half updated."""
        interrupts: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
        try:
            with closing(conversation.say(text)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    print(for_stream(piece, sys.stdout), end="", flush=True)
                    self._mid_line = True
                    if interrupts:
                        break
        finally:
            signal.signal(signal.SIGINT, before)
        self._end_line()
        if interrupts:
            self.note("stopped")
