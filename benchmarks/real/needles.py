# SPDX-License-Identifier: Apache-2.0
"""Texts with one fact among sentences that have nothing to do with it, and a question about the fact."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from . import parts

# Kind of fact: who or what it is about, the sentence, the question, the beginning of the answer, possible answers.
FACTS: dict[str, tuple[tuple[str, ...], str, str, str, tuple[str, ...]]] = {
    "code": (
        ("safe", "garage", "cellar", "office", "locker"),
        "The code of the {} is {}.", "What is the code of the {}?", "The code of the {} is",
        tuple(f"{7919 * (number + 3) % 9000 + 1000}" for number in range(60)),
    ),
    "color": (
        ("bicycle", "piano", "boat", "umbrella", "carpet"),
        "The color of Anna's {} is {}.", "What is the color of Anna's {}?", "The color of Anna's {} is",
        ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white"),
    ),
    "city": (
        ("conference", "wedding", "auction", "festival", "trial"),
        "The {} takes place in the city of {}.", "In which city does the {} take place?",
        "The {} takes place in the city of",
        ("Paris", "London", "Berlin", "Madrid", "Rome", "Tokyo", "Moscow", "Vienna", "Boston", "Chicago"),
    ),
    "name": (
        ("dog", "parrot", "sailor", "baker", "teacher"),
        "The name of the {} is {}.", "What is the name of the {}?", "The name of the {} is",
        ("Peter", "Oscar", "Martha", "Victor", "Clara", "Simon", "Nora", "Felix", "Laura", "Hugo"),
    ),
    "food": (
        ("Tom", "Emma", "Jack", "Sarah", "Daniel"),
        "The favorite food of {} is {}.", "What is the favorite food of {}?", "The favorite food of {} is",
        ("pizza", "rice", "cheese", "soup", "bread", "fish", "chocolate", "pasta", "salad", "honey"),
    ),
}  # fmt: skip
# Everyday sentences without names, numbers, colors, cities and food.
FILLER = (
    "The river bends around the old mill before it reaches the bridge.",
    "Most of the visitors arrive early in the morning and leave before noon.",
    "A light wind moved the curtains while the radio played in the kitchen.",
    "The children built a small house out of branches and leaves.",
    "Nobody knew how long the repairs on the road would take.",
    "The library keeps its maps in a narrow room behind the stairs.",
    "After the storm the garden was covered with broken twigs.",
    "The engine was loud, but it never failed on the long way home.",
    "He folded the letter, put it into a drawer and forgot about it.",
    "The mountains look closer than they are when the air is clear.",
    "Every evening the lamps along the harbor are lit one after another.",
    "She practiced the same piece until her neighbors knew it by heart.",
    "The clock in the hall has been slow since the winter.",
    "A narrow path leads through the forest to an empty hut.",
    "The train stopped between two stations for no apparent reason.",
    "They measured the room twice and still bought a table that was too large.",
    "In summer the windows stay open and one hears the trams.",
    "The museum closed its upper floor because of a leaking roof.",
    "It took the whole afternoon to carry the boxes to the attic.",
    "The farmers met once a week to talk about the weather.",
    "A thick book lay open on the desk, its corners bent with use.",
    "The ferry crosses the lake when there are enough passengers.",
    "The paint on the fence had come off in large flakes.",
    "Before the play began, the actors walked quietly across the stage.",
    "The ground was too wet to sit on, so everybody stood.",
    "A message in a bottle was washed ashore and nobody could read it.",
    "The workshop smelled of wood and glue.",
    "His coat hung on the door as if he had just come in.",
    "The path along the canal is a good place for a walk on quiet days.",
    "The choir sang without an audience because the doors were locked.",
    "One of the wheels turned more slowly than the others.",
    "The valley was silent except for a distant saw.",
    "They waited under a roof until the rain grew weaker.",
    "The photographs were kept in a tin under the bed.",
    "A new teacher is hard to find in such a remote place.",
    "The stairs creak in the night although nobody walks on them.",
    "The market moves to the square behind the church in autumn.",
    "The plan looked simple on paper and complicated everywhere else.",
    "All the chairs had been put on the tables before sweeping.",
    "The kite rose quickly, pulled at its string and was gone.",
)


@dataclass(frozen=True)
class Needle:
    """A text with a fact in it.

    Attributes:
        words: token ids of the text.
        fact: places of the fact's tokens in it.
        depth: where the fact begins, as a share of the text.
    """

    kind: str
    words: list[int]
    fact: tuple[int, ...]
    depth: float
    question: str
    answer: str


def wanted_depth(number: int, trials: int) -> float:
    """Where the fact of trial `number` shall be, in [0, 1].

    The trials of a kind visit the depths 0, 1 / (n - 1), ..., 1 in an order of long steps, so that a part of the trials
    covers all depths, too.
    """
    each = max(1, trials // len(FACTS))
    step = next(step for step in range(max(1, round(0.38 * each)), each + 2) if math.gcd(step, each) == 1)
    return number // len(FACTS) * step % each / max(1, each - 1)


def needle(number: int, trials: int, places: int) -> Needle:
    """Text `number` of `trials`: kinds of facts take turns, depths go from the first to the last place.

    Args:
        places: tokens of the whole text.
    """
    rng = random.Random(f"needle {number} {places}")
    tokenizer = parts.tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    kind = list(FACTS)[number % len(FACTS)]
    subjects, sentence, question, begin, answers = FACTS[kind]
    subject, answer = rng.choice(subjects), rng.choice(answers)
    fact = encode(" " + sentence.format(subject, answer))
    sentences = [encode(" " + text) for text in rng.sample(FILLER, len(FILLER))]
    filler: list[int] = []
    ends = [0]  # places between sentences
    while len(filler) < places - len(fact):
        filler += sentences[(len(ends) - 1) % len(sentences)]
        ends.append(len(filler))
    room = places - len(fact)
    filler = filler[:room]
    wanted = wanted_depth(number, trials) * room
    start = min([end for end in ends if end <= room] + [room], key=lambda end: abs(end - wanted))
    words = filler[:start] + fact + filler[start:]
    text = f"\nQuestion: {question.format(subject)}\nAnswer: {begin.format(subject)}"
    return Needle(kind, words, tuple(range(start, start + len(fact))), start / places, text, answer)
