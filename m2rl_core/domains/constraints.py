"""The constraints of the miniature instruction-following domain: what they ask for, how they read, what obeys them.

Each is a real instruction id of IFEval (`SEEN`: training shows them) or IFBench (`UNSEEN`: no training row names them)
with real parameters. A prompt says in a few plain words what the benchmark says in a sentence or two. Left out are
ids that need NLTK data, and letter case, because telling the language of so short a text is unreliable.
"""
from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

THINGS = ("milk", "meat", "grass", "rain", "games", "water", "bread", "honey")
FILLERS = ("small", "big", "red", "old", "warm", "soft", "fast", "happy", "good")
TOPICS = {  # topic: (what it is, what it likes)
    topic: (FILLERS[i % len(FILLERS)], THINGS[i % len(THINGS)])
    for i, topic in enumerate((
        "cat", "dog", "cow", "hen", "fox", "pig", "bee", "owl", "fish", "frog", "duck", "horse",
        "lamb", "bear", "bird", "tree", "car", "bus", "boat", "robot", "baby", "cook", "farmer", "mouse",
    ))
}
KEYWORDS = ("river", "moon", "school", "song", "garden", "king", "box", "hill")
VERBS = ("sees", "finds", "has")
BLANKS = ("[name]", "[place]", "[time]")
ENDINGS = ("The end.", "That is all.", "Thank you.", "See you soon.", "Good luck.", "Have a nice day.")
NAMES = ("Emma", "Noah", "Mia", "Leo")
JOINED = ("It is old but happy.", "It is good so warm.", "It is red or big.")
INSTEAD = {"is": "looks", "it": "she", "and": "but", "likes": "wants"}  # forbidden word: what to write in its place


@dataclass(frozen=True)
class Kind:
    """One instruction id: parameters to draw, how a prompt says it, how a plan names it, and a way to miss it.

    `miss` gives the parameters of a neighbouring constraint, which an answer then obeys instead; None drops it.
    """

    draw: Callable[[random.Random], dict]
    say: Callable[[dict], str]
    plan: Callable[[dict], str]
    miss: Callable[[dict], dict | None] = lambda kwargs: None


def _some(words: Sequence[str], most: int) -> Callable[[random.Random], list[str]]:
    return lambda rng: sorted(rng.sample(words, rng.choice(range(1, most + 1))))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _words(words: list[str]) -> str:
    return f"word{'s' * (len(words) > 1)} {', '.join(words)}"


def _one_less(name: str) -> Callable[[dict], dict]:
    return lambda kwargs: {**kwargs, name: kwargs[name] - 1}


SEEN = {
    "punctuation:no_comma": Kind(lambda rng: {}, lambda k: "Use no commas.", lambda k: "no comma"),
    "startend:quotation": Kind(lambda rng: {}, lambda k: "Put all of it in quotes.", lambda k: "quotes"),
    "startend:end_checker": Kind(
        lambda rng: {"end_phrase": rng.choice(ENDINGS)},
        lambda k: f"End with: {k['end_phrase']}",
        lambda k: f"end {k['end_phrase']}",
        lambda k: {"end_phrase": ENDINGS[ENDINGS.index(k["end_phrase"]) - 1]},
    ),
    "detectable_format:title": Kind(lambda rng: {}, lambda k: "Add a title in << >>.", lambda k: "title"),
    "detectable_format:number_bullet_lists": Kind(
        lambda rng: {"num_bullets": rng.choice((1, 2, 3))},
        lambda k: f"Give {_count(k['num_bullets'], 'bullet')}.",
        lambda k: f"{_count(k['num_bullets'], 'bullet')}",
        lambda k: {"num_bullets": k["num_bullets"] % 3 + 1},
    ),
    "detectable_format:number_highlighted_sections": Kind(
        lambda rng: {"num_highlights": rng.choice((1, 2, 3))},
        lambda k: f"Mark {_count(k['num_highlights'], 'word')} with *.",
        lambda k: f"{_count(k['num_highlights'], 'mark')}",
        _one_less("num_highlights"),
    ),
    "detectable_content:postscript": Kind(
        lambda rng: {"postscript_marker": rng.choice(("P.S.", "P.P.S"))},
        lambda k: f"Add a {k['postscript_marker']} note.",
        lambda k: f"{k['postscript_marker']} note",
    ),
    "detectable_content:number_placeholders": Kind(
        lambda rng: {"num_placeholders": rng.choice((1, 2, 3))},
        lambda k: f"Use {_count(k['num_placeholders'], 'blank')} in [ ].",
        lambda k: f"{_count(k['num_placeholders'], 'blank')}",
        _one_less("num_placeholders"),
    ),
    "keywords:existence": Kind(
        lambda rng: {"keywords": _some(KEYWORDS, 2)(rng)},
        lambda k: f"Use the {_words(k['keywords'])}.",
        lambda k: _words(k["keywords"]),
        lambda k: {"keywords": k["keywords"][:-1]} if len(k["keywords"]) > 1 else None,
    ),
    "keywords:forbidden_words": Kind(
        lambda rng: {"forbidden_words": _some(tuple(INSTEAD), 2)(rng)},
        lambda k: f"Do not use the {_words(k['forbidden_words'])}.",
        lambda k: f"not {' '.join(k['forbidden_words'])}",
        lambda k: {"forbidden_words": k["forbidden_words"][:-1]} if len(k["forbidden_words"]) > 1 else None,
    ),
    "keywords:frequency": Kind(
        lambda rng: {"keyword": rng.choice(KEYWORDS), "frequency": rng.choice((2, 3)), "relation": "at least"},
        lambda k: f"Use the word {k['keyword']} at least {k['frequency']} times.",
        lambda k: f"{k['keyword']} {k['frequency']} times",
        _one_less("frequency"),
    ),
}
UNSEEN = {
    "count:numbers": Kind(
        lambda rng: {"N": rng.choice((1, 2, 3, 4))},
        lambda k: f"Use exactly {_count(k['N'], 'number')}.",
        lambda k: f"{_count(k['N'], 'number')}",
        lambda k: {"N": k["N"] % 4 + 1},
    ),
    "count:word_count_range": Kind(
        lambda rng: {"min_words": (low := rng.choice(range(6, 18))), "max_words": low + rng.choice((3, 4, 5))},
        lambda k: f"Use {k['min_words']} to {k['max_words']} words.",
        lambda k: f"{k['min_words']} to {k['max_words']} words",
        lambda k: {"min_words": k["max_words"] + 1, "max_words": k["max_words"] + 6},
    ),
    "count:unique_word_count": Kind(
        lambda rng: {"N": rng.choice(range(9, 15))},
        lambda k: f"Use at least {k['N']} different words.",
        lambda k: f"{k['N']} different words",
    ),
    "count:pronouns": Kind(
        lambda rng: {"N": rng.choice((2, 3, 4))},
        lambda k: f"Use at least {_count(k['N'], 'pronoun')}.",
        lambda k: f"{_count(k['N'], 'pronoun')}",
    ),
    "count:conjunctions": Kind(
        lambda rng: {"small_n": rng.choice((2, 3, 4))},
        lambda k: f"Use at least {k['small_n']} of: and, but, so, or.",
        lambda k: f"{k['small_n']} of and but so or",
    ),
    "count:person_names": Kind(
        lambda rng: {"N": rng.choice((1, 2, 3))},
        lambda k: f"Use {k['N']} of the names {', '.join(NAMES)}.",
        lambda k: f"{_count(k['N'], 'name')}",
        _one_less("N"),
    ),
    "sentence:keyword": Kind(
        lambda rng: {"word": rng.choice(KEYWORDS), "N": rng.choice((2, 3))},
        lambda k: f"Use the word {k['word']} in sentence {k['N']}.",
        lambda k: f"{k['word']} in sentence {k['N']}",
    ),
    "format:no_bullets_bullets": Kind(
        lambda rng: {}, lambda k: "Write 2 sentences. Then give 2 bullets.", lambda k: "2 sentences; 2 bullets"
    ),
}
KINDS = {**SEEN, **UNSEEN}


def draft(topic: str, wanted: Mapping[str, dict], fillers: int, order: Sequence[str]) -> str:
    """A text made for the constraints `wanted` (id -> parameters), with `fillers` more sentences; it may break some.

    `order` gives the words for fillers, bullets and notes.
    """

    def of(name, key, default=0):
        return wanted.get(name, {}).get(key, default)

    words = itertools.cycle(order)
    marks = of("detectable_format:number_highlighted_sections", "num_highlights")
    what, how, likes = (f"*{word}*" if i < marks else word for i, word in enumerate((topic, *TOPICS[topic])))
    comma = "" if "punctuation:no_comma" in wanted else ","
    sentences = [f"The {what} is {how}{comma} and it likes {likes}."]
    sentences += [f"It is {next(words)}." for _ in range(fillers)]
    if word := of("sentence:keyword", "word"):
        sentences.append(f"It sees the {word}.")
    if keywords := of("keywords:existence", "keywords"):
        sentences.append(f"It knows the {' and the '.join(keywords)}.")
    again = VERBS[:of("keywords:frequency", "frequency")]
    sentences += [f"It {verb} the {of('keywords:frequency', 'keyword')}." for verb in again]
    if blanks := of("detectable_content:number_placeholders", "num_placeholders"):
        sentences.append(f"Ask {' '.join(BLANKS[:blanks])}.")
    if numbers := of("count:numbers", "N"):
        sentences.append(f"It counts {' '.join(str(i + 1) for i in range(numbers))}.")
    if names := of("count:person_names", "N"):
        sentences.append(f"It knows {' and '.join(NAMES[:names])}.")
    sentences += JOINED[:max(0, of("count:conjunctions", "small_n") - 1)]
    bullets = of("detectable_format:number_bullet_lists", "num_bullets", 2 * ("format:no_bullets_bullets" in wanted))
    lines = [" ".join(sentences), *(f"* It is {next(words)}." for _ in range(bullets))]
    if marker := of("detectable_content:postscript", "postscript_marker"):
        lines.append(f"{marker} It is {next(words)}.")
    text = _without(of("keywords:forbidden_words", "forbidden_words", ()), "\n".join(lines))
    if "detectable_format:title" in wanted:
        text = f"<<The {topic}>>\n{text}"
    if ending := of("startend:end_checker", "end_phrase"):
        text = f"{text}\n{ending}"
    return f'"{text}"' if "startend:quotation" in wanted else text


def _without(forbidden, text):
    for word in forbidden:
        text = re.sub(rf"\b{word}\b", INSTEAD[word], text)
        text = re.sub(rf"\b{word.capitalize()}\b", INSTEAD[word].capitalize(), text)
    return text
