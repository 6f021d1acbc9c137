"""Make a small preference set in HH-RLHF's format, with nothing downloaded.

The chosen answer states what a question about one of some sixty subjects asks for. The rejected
one is of a similar length, but evades the question and repeats itself. The facts and their wording
are written by hand in ``knowledge.txt``. A seed decides how each question is asked and which turns
come before it. The subjects of the test pairs appear in no training pair, so a higher test accuracy
cannot come from remembered answers.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib import resources
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

from alignkit.utils.atomic import write_atomically

TEST_SUBJECTS = 9


class Fact(NamedTuple):
    """Hold a question and an answer that states a fact.

    Example:
        >>> Fact("How long does an egg boil?", "Eight minutes, until it is hard.").question
        'How long does an egg boil?'
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Subject:
    """Hold the facts about one subject, whose name fits into "when it comes to …".

    Example:
        >>> load_subjects()[0].facts[0]
        Fact(question='...', answer='...')
    """

    name: str
    facts: tuple[Fact, ...]


# Openings of dialogues and of answers; chosen and rejected answers draw from the same ones.
_OPENINGS = (
    "Hi there. This is about {subject}. ",
    "I have a quick question about {subject}. ",
    "I'm new to {subject}. ",
    "My neighbour and I disagree about {subject}. ",
    "I've read three different things about {subject}. ",
    "Could you help me with {subject}? ",
    "I only have a minute, and it's about {subject}. ",
    "My sister asked me about {subject} and I didn't know. ",
    "I'm giving a talk on {subject} next weekend. ",
    "There is something about {subject} I've wondered about for years. ",
    "About {subject}, and please keep it short. ",
    "I've been getting into {subject} lately. ",
)
_BEFORE_ANSWER = ("Good question. ", "Sure. ", "Happy to help. ", "Of course. ", "Let me see. ")
_SECOND_QUESTION = (" And one more thing: ", " Also: ", " I'd like to know this as well: ")
_FOLLOW_UPS = ("Thanks. ", "Okay, that makes sense. ", "I see. ", "Good to know. ", "")
_JOIN_ANSWERS = (" As for the other question: ", " On your second point: ", " ")

# For each manner of evading: sentences that do so first, and sentences that repeat it.
_EVASIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "When it comes to {subject}, it really depends.",
            "That depends on a lot of different things.",
            "Every situation is different, so it is hard to say anything about {subject}.",
            "Some people do it one way and some people do it another way.",
        ),
        (
            "So it depends.",
            "Again, it all depends on the situation.",
            "As I said, it really depends.",
            "It could be one thing, or it could be another thing.",
        ),
    ),
    (
        (
            "I'm not sure that I'm the right one to ask about {subject}.",
            "You should probably ask an expert about that.",
            "There are professionals who know about {subject}.",
            "It would be best to speak to someone who knows.",
        ),
        (
            "An expert would be able to tell you.",
            "So please ask an expert.",
            "I would really ask a professional about it.",
            "Someone who knows about it will know.",
        ),
    ),
    (
        (
            "There is a lot of information about {subject} out there.",
            "You can find many articles about that on the internet.",
            "A lot has been written about {subject}.",
            "Many websites talk about this.",
        ),
        (
            "You could search for it.",
            "Just look it up and you will find something.",
            "There is really a lot of information about it.",
            "The internet has many answers to this.",
        ),
    ),
    (
        (
            "The important thing about {subject} is to do it properly.",
            "You should do it in the right way and not in the wrong way.",
            "With {subject}, just make sure that everything is right.",
            "It is important to be careful and to do what works.",
        ),
        (
            "If you do it right, it will be right.",
            "Do it well and it will go well.",
            "Doing it properly is very important.",
            "Just be careful, because being careful is important.",
        ),
    ),
    (
        (
            "So you want to know about {subject}.",
            "You are asking me about {subject}, which is something people ask about.",
            "{Subject} is a topic, and your question is about that topic.",
            "People have asked about this before.",
        ),
        (
            "That is what you are asking.",
            "It is an interesting thing to ask about.",
            "Many people are interested in {subject}.",
            "So that is the question.",
        ),
    ),
    (
        (
            "I'm sorry, I can't really say much about {subject}.",
            "Honestly, I don't want to give a definite answer.",
            "I would rather not go into detail about that.",
            "It is difficult for me to answer questions about {subject}.",
        ),
        (
            "I really can't say.",
            "Sorry again that I can't be more specific.",
            "There is not much more that I could say.",
            "I hope you understand that I can't go into it.",
        ),
    ),
    (
        (
            "{Subject} is wonderful and I think it is great that you ask.",
            "You are doing great, just keep going.",
            "Don't worry too much about it.",
            "I'm sure that you will figure it out.",
        ),
        (
            "You will be fine.",
            "It will work out somehow, it always does.",
            "Just trust yourself and don't worry.",
            "Really, there is no need to worry about {subject}.",
        ),
    ),
)


def load_subjects() -> list[Subject]:
    """Read the hand-written subjects, their questions and answers."""
    text = (
        resources.files("alignkit.tools.demo").joinpath("knowledge.txt").read_text(encoding="utf-8")
    )
    subjects = []
    for block in text.strip().split("\n\n"):
        name, *lines = block.splitlines()
        bodies = [line.removeprefix("Q ").removeprefix("A ") for line in lines]
        facts = tuple(map(Fact, bodies[::2], bodies[1::2]))
        subjects.append(Subject(name.removeprefix("# "), facts))
    return subjects


def write_preferences(directory: Path, seed: int = 0) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` of chosen and rejected dialogues.

    Args:
        directory: The directory, made if needed; the two files are replaced.
        seed: Seed of the split of the subjects and of every choice of words.
    """
    rng = random.Random(seed)
    subjects = load_subjects()
    rng.shuffle(subjects)
    used: set[str] = set()
    splits = {"test": subjects[:TEST_SUBJECTS], "train": subjects[TEST_SUBJECTS:]}
    for split, chosen_subjects in splits.items():
        pairs = [pair for subject in chosen_subjects for pair in make_pairs(subject, rng, used)]
        rng.shuffle(pairs)
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        write_atomically(directory / f"{split}.jsonl", "".join(lines))


def make_pairs(subject: Subject, rng: random.Random, used: set[str]) -> list[dict[str, str]]:
    """Return three pairs for each fact: asked alone, after another one, and with another one.

    Args:
        subject: The subject of the questions.
        rng: The random generator that chooses the wording.
        used: Evasive answers given so far. None is given twice, and new ones are added.
    """
    pairs = []
    for fact in subject.facts:
        earlier, other = rng.sample([f for f in subject.facts if f is not fact], 2)
        alone, first, both = (
            text.format(subject=subject.name) for text in rng.sample(_OPENINGS, 3)
        )
        pairs.append(_pair(subject, alone + fact.question, fact.answer, rng, used))

        history = f"{first}{earlier.question}\n\nAssistant: {earlier.answer}\n\nHuman: "
        follow_up = rng.choice(_FOLLOW_UPS) + fact.question
        pairs.append(_pair(subject, history + follow_up, fact.answer, rng, used))

        asked = both + fact.question + rng.choice(_SECOND_QUESTION) + other.question
        answer = fact.answer + rng.choice(_JOIN_ANSWERS) + other.answer
        pairs.append(_pair(subject, asked, answer, rng, used))
    return pairs


def _pair(
    subject: Subject, asked: str, answer: str, rng: random.Random, used: set[str]
) -> dict[str, str]:
    prompt = f"\n\nHuman: {asked}\n\nAssistant:"
    words = round(len(answer.split()) * rng.uniform(0.55, 1.15))
    evasive = _evade(subject.name, words, rng)
    while evasive in used:
        evasive = _evade(subject.name, words, rng)
    used.add(evasive)
    openings = [rng.choice(_BEFORE_ANSWER) if rng.random() < 0.3 else "" for _ in range(2)]
    return {
        "chosen": f"{prompt} {openings[0]}{answer}",
        "rejected": f"{prompt} {openings[1]}{evasive}",
    }


def _evade(subject: str, words: int, rng: random.Random) -> str:
    """Return an evasive answer of about so many words, in two manners that repeat themselves."""
    (first, again_first), (second, again_second) = rng.sample(_EVASIONS, 2)
    repeats = rng.sample(again_first, 3) + rng.sample(again_second, 3)
    sentences = [*rng.sample(first, 2), repeats.pop(0), rng.choice(second)]
    said: list[str] = []
    for sentence in chain(sentences, cycle(repeats)):
        said.append(sentence.format(subject=subject, Subject=subject[0].upper() + subject[1:]))
        if len(said) >= 2 and len(" ".join(said).split()) >= words:
            break
    return " ".join(said)
