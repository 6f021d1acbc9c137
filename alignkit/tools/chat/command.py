"""Run ``alignkit chat``, which talks with trained models and switches between them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from alignkit.errors import AlignkitError
from alignkit.tools.chat.seats import Seat, load_seats, unknown_seat
from alignkit.tools.generate.command import REQUEST_FLAGS
from alignkit.tools.generate.options import add_options, gather_options
from alignkit.tools.generate.prompts import chat_prompt
from alignkit.tools.generate.request import Request, printable
from alignkit.tools.generate.sampling import complete
from alignkit.tools.naming import name_models
from alignkit.utils.atomic import check_output

_HELP = """\
/model NAME   ask another model from here on; without a name, list them
/system TEXT  a system message from here on; without a text, none
/reset        forget what was said
/help         show this
/quit         end, as the end of the input does"""
_FIXED: set[str | int] = {*REQUEST_FLAGS, "prompts_file", "data", "batch_size"}


@dataclass
class Chat:
    """Hold a conversation: who is asked, and what was said.

    Example:
        >>> chat = Chat(seats={}, name="sft", request=Request("Hi", device="cpu"), history=None)
        >>> chat.messages
        []

    Attributes:
        seats: The models by name.
        name: The one that is asked.
        request: How answers are drawn.
        history: The file that every turn is added to.
        system: A system message; ``None`` for that of training.
        messages: What was said so far.
        turns: How many answers were given, which their seeds count up with.
    """

    seats: dict[str, Seat]
    name: str
    request: Request
    history: Path | None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0

    def answer(self, text: str) -> str:
        """Print the answer to a text while it is drawn, and keep both."""
        seat = self.seats[self.name]
        seat.take()
        asked = seat.asked
        system = asked.system if self.system is None else self.system
        said = [{"role": "system", "content": system}] if system else []
        said += [*self.messages, {"role": "user", "content": text}]
        prompt = chat_prompt(said, asked, seat.tokenizer)
        sampling = self.request.sampling_for(asked)
        (answer,) = complete(
            seat.model,
            seat.tokenizer,
            [prompt],
            replace(sampling, seed=sampling.seed + self.turns),
            kind=asked.prompt_format,
            ends=asked.ends,
            told=lambda piece: print(printable(piece), end="", flush=True),
        )
        print(flush=True)
        self.turns += 1
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
        self._keep({"model": self.name, "system": system, "prompt": text, "answer": answer})
        return answer

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash says, and tell whether the chat goes on.

        Raises:
            AlignkitError: It is no such command, or names no model of the chat.
        """
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/model" and rest in self.seats:
            self.name = rest
            print(f"asking {rest}")
        elif word == "/model" and not rest:
            print(", ".join(f"{n} (asked)" if n == self.name else n for n in self.seats))
        elif word == "/model":
            raise unknown_seat(rest, self.seats)
        elif word == "/system":
            self.system = rest
            print("system message set" if rest else "no system message")
        elif word == "/reset":
            self.messages.clear()
            print("forgotten")
        elif word == "/help":
            print(_HELP)
        else:
            raise AlignkitError(f"{word}: no such command; /help lists them")
        return True

    def _keep(self, turn: dict[str, Any]) -> None:
        if self.history is not None:
            self.history.parent.mkdir(parents=True, exist_ok=True)
            with self.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(turn, ensure_ascii=False) + "\n")


def chat(models: list[str], *, history: str | None = "chat.jsonl", **options: Any) -> Chat:
    """Run a conversation: type a line, read the answer; ``/help`` lists what else a line may be.

    Adapters of one base share a copy of it, and ``/model NAME`` switches between them at once;
    ``base`` is the base alone. What was said stays said, so that the next model goes on from there.

    Args:
        models: NAME=PATH or PATH each; the first is asked until ``/model`` names another.
        history: A file that each turn is added to, as a line of JSON; ``null`` keeps none.
        **options: As in `alignkit.tools.generate.request.Request`.

    Returns:
        The conversation.

    Raises:
        AlignkitError: A model cannot be loaded, an option is bad, or the history cannot be written.
    """
    named = name_models(models)
    options = gather_options(options)
    request = Request(prompts=["(chat)"], **options)
    file = _check_history(history)
    seats = load_seats(named, request)
    talk = Chat(seats, next(iter(named)), request, file, request.system)
    watched = sys.stdin.isatty()
    if watched:
        kept = f"; kept in {file}" if file else ""
        print(f"asking {talk.name} of {', '.join(seats)}{kept}; /help lists commands")
    for line in _lines(talk, watched):
        try:
            if not line.startswith("/"):
                talk.answer(line)
            elif not talk.obey(line):
                break
        except AlignkitError as error:
            if not watched:
                raise
            print(f"alignkit: {error}", file=sys.stderr)
    return talk


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `chat`, whose models are positional."""
    parser.add_argument(
        "models", nargs="+", type=str, metavar="[NAME=]PATH", help="Models, the one to ask first."
    )
    add_options(parser)
    parser.add_function_arguments(chat, skip={"models", *_FIXED})


def _lines(talk: Chat, watched: bool) -> Iterator[str]:
    """Yield what the user says, without blank lines."""
    if watched:
        import readline  # noqa: F401 (gives `input` its editing and its memory)
    while True:
        try:
            line = input(f"{talk.name}> " if watched else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _check_history(history: str | None) -> Path | None:
    path = check_output(history, "--history")
    if path is not None and path.exists() and not os.access(path, os.W_OK):
        raise AlignkitError(f"--history '{history}': cannot be written to; choose another file")
    return path
