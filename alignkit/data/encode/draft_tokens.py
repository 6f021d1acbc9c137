"""Encode drafts as token ids, and check that an answer changes no ids of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

from alignkit.data.encode.draft import DraftExample
from alignkit.data.encode.tokens import TextEncoder
from alignkit.data.text.dialogue import ASSISTANT
from alignkit.data.text.formats import Format, Rendered
from alignkit.errors import AlignkitError


class DraftTokenizer:
    """Render drafts and compute their token ids.

    Args:
        encode: The tokenizer's.
        form: Renders the dialogues.
        masked: Whether only some of a response's tokens carry loss, by turns.
    """

    def __init__(self, encode: TextEncoder, form: Format, *, masked: bool) -> None:
        self._encode = encode
        self._format = form
        self._masked = masked

    @cached_property
    def _answer_label(self) -> str:
        """Return the label before every answer, where it is enough for the boundary proof."""
        simple = self._format.name == "boundary" and not self._masked
        apart = simple and self._encode.reads_words_apart
        return f"\n\n{ASSISTANT}" if apart else ""

    def fill(self, drafts: Sequence[DraftExample], starts: Sequence[int] | None = None) -> None:
        """Compute the ids, each prompt once, with the boundary proof.

        Args:
            drafts: What to encode, from their dialogues.
            starts: The turn that each prompt starts from; default: the first.
        """
        for draft, start in zip(drafts, starts or [0] * len(drafts), strict=True):
            draft.start = start
            try:
                draft.text = self._format.render(draft.dialogue, start)
            except AlignkitError as error:
                draft.refusal = str(error)
            draft.proved, draft.violation = False, None
        drafts = [draft for draft in drafts if not draft.refusal]
        if self._answer_label:
            self._fill_after_label(
                [d for d in drafts if d.text.prompt.endswith(self._answer_label)]
            )
        self._fill_whole([draft for draft in drafts if not draft.proved])
        for draft in drafts:
            kept = len(self._encode.bos)
            draft.movable = (0, 0) if self._format.keeps_start else (kept, len(draft.prompt))

    def _fill_after_label(self, drafts: Sequence[DraftExample]) -> None:
        """Encode each answer behind its label, which proves the boundary at little cost.

        Where the prompt's ids end with the label's and the led answer's begin with them, the
        two meet in the same text and the same tokens, so nothing changes when they are joined
        (see `TextEncoder.reads_words_apart`). Other drafts stay unproved.
        """
        texts = [self._answer_label]
        for draft in drafts:
            texts.append(draft.text.prompt)
            texts += [self._answer_label + answer for (answer,) in draft.text.responses]
        lead, *encoded = self._encode(texts)
        ids, size = iter(encoded), len(lead)
        for draft in drafts:
            prompt = next(ids)
            answers = [next(ids) for _ in draft.text.responses]
            draft.proved = all(part[:size] == lead for part in (prompt[-size:], *answers))
            draft.prompt = self._encode.with_bos(prompt, self._format.name)
            draft.responses = [[*answer[size:], self._encode.eos] for answer in answers]
            draft.blank = any(len(answer) == size for answer in answers)

    def _fill_whole(self, drafts: Sequence[DraftExample]) -> None:
        """Encode each prompt alone and then with each piece that follows it.

        A text is encoded as one, as a tokenizer that puts something before every text wants it.
        Where the ids so far lead the longer text's, the rest of those are the piece's. Where
        they do not at the start of a turn of the assistant, the boundary is violated and the
        piece is encoded by itself; at the end of one, a token that reaches beyond it is not the
        assistant's.
        """
        grown = [text for draft in drafts for text in _growing(draft.text)]
        ids = iter(self._encode(grown, specials=self._format.specials))
        apart: list[DraftExample] = []
        for draft in drafts:
            bare = next(ids)
            pieces = []
            for response in draft.text.responses:
                before, split = bare, list[list[int]]()
                for number, _ in enumerate(response):
                    whole = next(ids)
                    same = len(before)
                    if whole[:same] != before:
                        same = _common(before, whole)
                        if number % 2 == 0:
                            draft.violation = draft.violation or "".join(response)
                        else:
                            split[-1] = split[-1][: len(split[-1]) - (len(before) - same)]
                    split.append(whole[same:])
                    before = whole
                pieces.append(split)
            draft.prompt = self._encode.with_bos(bare, self._format.name)
            if draft.violation is None:
                self._put(draft, pieces)
            else:
                apart.append(draft)
        texts = [piece for draft in apart for each in draft.text.responses for piece in each]
        ids = iter(self._encode(texts, specials=self._format.specials))
        for draft in apart:
            self._put(draft, [[next(ids) for _ in each] for each in draft.text.responses])

    def _put(self, draft: DraftExample, pieces: Sequence[Sequence[list[int]]]) -> None:
        """Put a draft's responses together from the ids of their pieces."""
        draft.responses, draft.scored, draft.blank = [], [], draft.text.blank
        for text, split in zip(draft.text.responses, pieces, strict=True):
            *before, last = split
            draft.blank |= not last
            if not self._format.ended(text):
                last = [*last, self._encode.eos]
            draft.responses.append([token for piece in (*before, last) for token in piece])
            if self._masked:
                flags = [[i % 2 == 0] * len(piece) for i, piece in enumerate((*before, last))]
                draft.scored.append([flag for piece in flags for flag in piece])

    def tokens_of(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Return the range of ids that stand for a part of a text and nothing else."""
        places = self._encode.offsets(text, specials=self._format.specials)
        inside = [i for i, (at, upto) in enumerate(places) if start <= at and upto <= end]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the ids that two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _growing(text: Rendered) -> Iterator[str]:
    """Yield the prompt, and for each response the prompt with one more of its pieces each time."""
    yield text.prompt
    for response in text.responses:
        yield from accumulate((text.prompt + response[0], *response[1:]))
